"""The host's service: desired state, reconciler, relay and APIs."""
