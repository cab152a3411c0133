"""The tests are a package, so that no other one of that name on the path is taken for it."""
