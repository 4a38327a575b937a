"""Tools for a finished dataset: inspect, share, derive, import and export."""
