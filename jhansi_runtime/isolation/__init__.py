"""The trusted core: one container for one exec, built by an ordinary user from kernel parts alone.

Theory of operation
-------------------
Four processes take part.

The *host* is whoever wants something run. It makes a channel, a SOCK_SEQPACKET socket, gives one end away with the
request for a container, and from then on talks to the container's init alone; it holds init's pidfd to end it.

The *launcher* (launcher.py) is a fresh interpreter with one thread, an empty environment and none of the host's
descriptors. It clones init straight into fresh user, mount, pid, net, ipc, uts and cgroup namespaces, writes init's id
map, and reaps it in the end. A host with one thread may be its own launcher (launch.py is all there is to it). What is
the same for every container the launcher can begin ahead, when the host tells it that there will be another.

*init* (inside.py) is PID 1 of the container, our code, trusted. It begins (forks the job to be, loopback, hostname) and
waits for somebody to want it; told what to build, it builds (mounts, pivot_root, a Landlock ruleset), says READY and
waits again; an ORDER, which carries the job's three standard streams as descriptors, makes it bind the one workspace,
detach the hidden folder of all workspaces, and hand the order on; it then reaps, forwards signals, ends what is left,
reports the outcome and exits.

The *job* (job.py) begins as a copy of init, forked ahead, and takes everything away from itself: a further user
namespace in which it has no capability, bounding set, no_new_privs, and once the order is there limits, what Landlock
does not allow, every descriptor but its three, the seccomp filter; then it calls execve. If any step fails, nothing is
executed and the step is reported.

          host              launcher               init                        job
begin     BEGIN ->          clone3, id map
                            MAPPED           ->    steps of `_begin`      ->   steps of `_prepare`
prepare   LAUNCH ->         LAUNCH           ->    steps of `_build`
                            <- LAUNCHED                                   <-   READY
                                              <-   READY
wait      ORDER ------------------------------->   ORDER                  ->   steps of `_equip`
run                                                workspace bound, the rest hidden
                                                   MOUNTED                ->   steps of `_confine`, execve
          SIGNAL ------------------------------>   kill                   ->
exit                                          <-   EXIT; reaps, exits
          RELEASE ->        reaps

A cold exec is a container that waits for nothing: its order may be sent before it is ready, and without a BEGIN all
begins with LAUNCH. A warm one waits ahead of its order. The steps are the same.

A *zygote* (outer.py, zygote.py) is a launcher that is run by the interpreter of a rootfs, inside a container of its
own: the jobs of its containers are forks of an interpreter that has started already, and run a Python file without
executing anything, after the same steps. While such a job waits it copies the memory that it is going to write to
(memory.py). Only a rootfs of signed packages has a zygote, for what it runs is trusted until the file begins. All that
is the host's there are the workspaces, for init to bind one of.

Who may be what. The outer user namespace maps one id: uid 1000 inside is the caller outside (started by root: an
unprivileged id). init holds all capabilities over the container's own namespaces and none over the host. The job's
inner user namespace maps 1000 to 1000 and holds none at all, so a bug that hands it root there gives it no power over
the mounts and the network around it. Whoever dies takes along what it started: the host its launcher (the socket
closes), the launcher its inits (PR_SET_PDEATHSIG), init everything in its pid namespace.

Kernel surprises are told where they matter. Modules: channel (the messages), spawn and launcher, launch, inside, job,
detach, outer and zygote, and one module a concern: cpython, memory, idmap, mounts, net, caps, landlock, seccomp,
signals, terminal, cgroup, processors, syscalls. Nothing here imports what is above it, and on the exec path nothing
outside the standard library but prctl.
"""
