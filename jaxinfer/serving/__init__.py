"""Models behind HTTP, and what an operator sees of them."""

try:
    import msgspec  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(f"serving needs {error.name}, which is not installed: pip install 'jaxinfer[serve]'",
                      name=error.name) from error
