"""What a run will need: memory per GPU and bytes on the wire."""
