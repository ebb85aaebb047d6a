"""Models as pure functions: one file each, with a `Config` and `build(config) -> Graph`; made to be copied."""
