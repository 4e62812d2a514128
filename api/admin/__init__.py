"""The administration of an appliance: what people do to it, over a Unix socket."""
