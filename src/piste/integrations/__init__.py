"""piste inside the frameworks people train with: one module each, imported on demand.

``import piste.integrations.lightning`` and so on; nothing here is imported by ``import piste``.
"""
