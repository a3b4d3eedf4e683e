"""The endpoints, one module a subject; `reir_serving.http.app` puts them together."""
