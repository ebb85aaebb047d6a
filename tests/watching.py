"""What tests of the server's watchers share: a site over models that are there already, and applications of parts."""

from jaxinfer.runtime.registry import Registry
from jaxinfer.serving.app import public
from jaxinfer.serving.settings import Settings
from jaxinfer.serving.site import Part, Site


def site_of(settings=None, **models) -> Site:
    """A site over these models, which are not warmed up."""
    registry = Registry()
    for name, model in models.items():
        model.warmup = lambda background: None
        registry.load(name, lambda model=model: model)
    return Site(registry, settings or Settings())


def admin_of(site: Site, *parts: Part):
    """The administration's routes alone, without a token."""
    return public(site, [Part(routes=part.admin) for part in parts])
