"""The whole way once, on real parts and on this machine: `coldstill demo`."""
