"""Generated identities: drawn faces for the demo and for tests."""
