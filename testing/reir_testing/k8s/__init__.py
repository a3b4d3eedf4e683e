"""What tests of the manifests need: schemas, and which connections NetworkPolicies allow."""
