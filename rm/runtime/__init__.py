"""ACTS: everything that touches Ray, the machine or the network on behalf of the decisions of `rm.core`."""
