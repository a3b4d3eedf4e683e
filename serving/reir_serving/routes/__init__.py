"""The endpoints, one module a subject; `reir_serving.app` puts them together."""
