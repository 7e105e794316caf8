"""The trusted core: one container for one exec, built by an ordinary user from kernel parts alone.

Theory of operation
-------------------
Three processes take part, and two sentences describe each.

The *launcher* (launch.py: whoever calls `launch`) has one thread. It clones init straight into fresh user, mount,
pid, net, ipc, uts and cgroup namespaces, writes init's id map, and from then on only talks to it over the channel,
a SOCK_SEQPACKET socket, and holds its pidfd.

*init* (inside.py) is PID 1 of the container, our code, trusted. It prepares (forks the job to be, mounts, pivot_root,
loopback, hostname), says READY and waits; an ORDER, which carries the job's three standard streams as descriptors,
makes it bind the one workspace, detach the hidden folder of all workspaces, and hand the order on; it then reaps,
forwards signals, ends what is left, reports the outcome and exits.

The *job* (job.py) begins as a copy of init, forked ahead, and takes everything away from itself: session, a further
user namespace in which it has no capability, bounding set, no_new_privs, and once the order is there limits, every
descriptor but its three, the seccomp filter; then it calls execve. If any step fails, nothing is executed and the step
is reported.

                 launcher                      init                          job
    prepare      clone3, id map     mapped ->  steps of `_prepare`     ->    steps of `_prepare`
                                                               <- READY
                                    <- READY
    wait                            ORDER ->   workspace bound, the rest hidden
    run                                                        ORDER   ->    steps of `_confine`, execve
                 signals            SIGNAL ->  kill                    ->
    exit                            <- EXIT    reaps, exits

A cold exec is a container that waits for nothing; a warm one waits ahead of its order. The steps are the same.

Who may be what. The outer user namespace maps one id: uid 1000 inside is the caller outside (started by root: an
unprivileged id). init holds all capabilities over the container's own namespaces and none over the host. The job's
inner user namespace maps 1000 to 1000 and holds none at all, so a bug that hands it root there gives it no power over
the mounts and the network around it.

Kernel surprises are told where they matter. Modules: channel (the messages), launch, inside, job, and one module a
concern: idmap, mounts, net, caps, seccomp, syscalls. Nothing here imports what is above it, and on the exec path
nothing outside the standard library but prctl.
"""
