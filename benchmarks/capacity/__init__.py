"""One student and teachers of growing size: which loss gains from a larger teacher?"""
