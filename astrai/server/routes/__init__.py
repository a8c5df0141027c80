"""The routes, one module per family; each has `mount(app, edge)`."""
