"""Node providers for Ray's autoscaler: nodes that are processes on this machine, and machines you own.

Loaded by `ray up`, `ray down` and the autoscaler on the head, through `provider: {type: external, module: …}`.
Nothing else of this package imports it.

    local, onprem       the providers
    commands            how a node's commands run: as a local process, over ssh
    surroundings        what a command of a node finds around it
    roster, rostered    which nodes there are, in a file that all these processes share; a provider that lives by it
    options             the `provider` section of the cluster's YAML, checked
    loopback            what a Ray node that shares its machine with others must do differently
    stop                `python -m rm.providers.stop`: in place of `ray stop`, which would end every Ray of the machine
"""
