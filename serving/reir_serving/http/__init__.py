"""The HTTP interface: routes, schemas, problem details and the OpenAPI document."""
