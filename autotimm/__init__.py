"""autotimm."""
