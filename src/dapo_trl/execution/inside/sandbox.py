"""
Shuts the process that calls it in: namespaces, an unprivileged user, limits, and forbidden system calls. Linux does all
of it, other systems the limits.

A process goes through here before any code that is judged runs in it, and cannot come back: what is given up is given
up for good, by its children too.
"""

import ctypes
import errno
import math
import os
import resource
import signal
import struct
import sys


NOBODY = 65534
_NEW_NS, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_NO_NEW_PRIVS, _SET_SECCOMP, _SET_CHILD_SUBREAPER = 1, 4, 38, 22, 36
_CAP_VERSION = 0x20080522
DEVICES = ("null", "random", "urandom")
WORK = "/tmp"  # the program's folder in a root of its own

# name -> number, of system calls that no program under test needs: what reaches other processes, the network and the
# kernel's rarer parts, and memory that no limit counts.
FORBIDDEN = {
    "x86_64": {
        "ptrace": 101, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170,
        "init_module": 175, "delete_module": 176, "finit_module": 313, "kexec_load": 246, "kexec_file_load": 320,
        "quotactl": 179, "add_key": 248, "request_key": 249, "keyctl": 250, "ioprio_set": 251, "mbind": 237,
        "set_mempolicy": 238, "migrate_pages": 256, "move_pages": 279, "unshare": 272, "setns": 308,
        "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304,
        "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "memfd_create": 319, "bpf": 321,
        "userfaultfd": 323, "pivot_root": 155, "chroot": 161, "acct": 163, "settimeofday": 164, "syslog": 103,
        "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
        "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "mount_setattr": 442,
        "memfd_secret": 447, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "socket": 41,
        "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203,
        "sched_setattr": 314, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424,
        "io_setup": 206,
    },
    "aarch64": {
        "ptrace": 117, "mount": 40, "umount2": 39, "swapon": 224, "swapoff": 225, "reboot": 142, "sethostname": 161,
        "init_module": 105, "delete_module": 106, "finit_module": 273, "kexec_load": 104, "kexec_file_load": 294,
        "quotactl": 60, "add_key": 217, "request_key": 218, "keyctl": 219, "ioprio_set": 30, "mbind": 235,
        "set_mempolicy": 237, "migrate_pages": 238, "move_pages": 239, "unshare": 97, "setns": 268,
        "perf_event_open": 241, "fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265,
        "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "memfd_create": 279, "bpf": 280,
        "userfaultfd": 282, "pivot_root": 41, "chroot": 51, "acct": 89, "settimeofday": 170, "syslog": 116,
        "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
        "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "mount_setattr": 442,
        "memfd_secret": 447, "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "socket": 198,
        "setpriority": 140, "sched_setparam": 118, "sched_setscheduler": 119, "sched_setaffinity": 122,
        "sched_setattr": 274, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424,
        "io_setup": 0,
    },
}  # fmt: skip
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SPACES = _NEW_NS | _NEW_CGROUP | _NEW_UTS | _NEW_IPC | _NEW_USER | _NEW_PID | _NEW_NET
# Calls whose arguments decide: numbers on the two machines; argument, the bits of it that are looked at, and the values
# of these that are refused, or (`False`) the only ones that are not.
_BY_ARGUMENT = (
    ("clone", (56, 220), 0, _SPACES, None, True),  # `None`: any of the bits
    ("prlimit64", (302, 261), 0, 0xFFFFFFFF, (0,), False),  # limits of itself only
    ("prctl", (157, 167), 0, 0xFFFFFFFF, (_SET_PDEATHSIG,), True),  # it ends with its monitor
    ("mmap", (9, 222), 3, 0x21, (0x21,), True),  # shared memory of no file, which no limit counts
    ("socketpair", (53, 199), 1, 0xF, (1,), False),  # streams only: datagrams may be sent to others
    ("fcntl", (72, 25), 1, 0xFFFFFFFF, (8, 10, 15), True),  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to others
    ("ioctl", (16, 29), 1, 0xFFFFFFFF, (0x8901, 0x8902), True),  # the same
)
_KILLS = ((62, 200, 234), (129, 130, 131))
_CLONE3 = 435
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _check(result, what):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(option, value):
    _check(_libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


# ---- Namespaces ----


def leave_namespaces():
    """
    New namespaces of users, processes, network, host name and System V objects; that of processes is for children.

    Root goes without one of users: what it mounts it may see, and it becomes nobody later.
    """
    flags = _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS | _NEW_CGROUP
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _check(_libc().unshare(flags), "unshare")
        return
    _check(_libc().unshare(flags | _NEW_USER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def make_root(shown, size):
    """
    A root of its own for this process: what it may read, and an empty folder to write to. There is no `/proc`.

    Args:
        shown (`list[str]`):
            Files and folders that are there, for reading only.
        size (`int`):
            Bytes that the folder holds.
    """
    libc = _libc()

    def mount(source, target, kind, flags, options=None):
        given = [None if each is None else each.encode() for each in (source, target, kind)]
        _check(libc.mount(*given, ctypes.c_ulong(flags), options and options.encode()), f"mount {target}")

    _check(libc.unshare(_NEW_NS), "unshare")
    mount(None, "/", None, _REC | _PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    number = _PIVOT_ROOT[os.uname().machine]
    _check(libc.syscall(ctypes.c_long(number), b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    for path in [*shown, *(f"/dev/{name}" for name in DEVICES)]:
        _show(path, mount, libc)
    os.makedirs(WORK)
    mount("tmpfs", WORK, "tmpfs", _NOSUID | _NODEV, f"size={size},nr_inodes=4096,mode=1777")
    _check(libc.umount2(b"/old", _DETACH), "umount")
    os.rmdir("/old")
    mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(WORK)


def _show(path, mount, libc):
    """Mount a path of the old root at its place, for reading only; a symbolic link is made again."""
    old = "/old" + path
    if not os.path.lexists(old) or os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.mkdir(path)
    else:
        open(path, "w").close()
    mount(old, path, None, _BIND | _REC)
    if path.startswith("/dev/"):
        return
    attributes = struct.pack("=4Q", _RDONLY | _NOSUID | _NODEV, 0, 0, 0)  # with all that is mounted below it
    found = libc.syscall(ctypes.c_long(_MOUNT_SETATTR), -100, path.encode(), 0x8000, attributes, len(attributes))
    _check(found, f"mount_setattr {path} (it takes Linux 5.12)")


# ---- The process itself ----


def become_nobody():
    """Give up root for good; and have processes counted apart from those of other programs, where that can be."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    if sys.platform == "linux":
        _libc().unshare(_NEW_USER)  # or not, where that is not allowed: then the monitor counts


def count_tasks():
    """Processes and threads of this user, which a limit of them counts; 0 where the system does not say."""
    number = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.geteuid():
                number += len(os.listdir(f"/proc/{name}/task"))
        except OSError:  # it has ended
            pass
    return number


def limit(limits, num_others):
    """
    Set limits that cannot be raised again.

    Args:
        limits (`dict[str, float]`):
            `cpu` in seconds, `memory`, `file_size` in bytes, `processes`.
        num_others (`int`):
            Processes and threads that count as ours, but are not.
    """
    wanted = {
        "CPU": math.ceil(limits["cpu"]) + 1,  # the monitor is to see first that it was too long
        "AS": limits["memory"],
        "FSIZE": limits["file_size"],
        "NPROC": limits["processes"] + num_others,
        "NOFILE": 64,
        "CORE": 1,  # 0 would still start the machine's crash reporter
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    for name, value in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # macOS refuses some
            pass


def die_with_parent():
    """Have this process killed when the one that started it is gone."""
    if sys.platform == "linux":
        _prctl(_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans():
    """Become the parent of descendants whose own parents end, so that none is lost."""
    if sys.platform == "linux":
        _prctl(_SET_CHILD_SUBREAPER, 1)


def die_first():
    """Be what the system ends first when memory runs out, so that it is not the monitor."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass


def hide():
    """Let no other process of this user look into this one."""
    if sys.platform == "linux":
        _prctl(_SET_DUMPABLE, 0)


def drop_privileges():
    """Give up all capabilities, and all ways to get some."""
    _prctl(_SET_NO_NEW_PRIVS, 1)
    header = struct.pack("=Ii", _CAP_VERSION, 0)
    _check(_libc().capset(header, struct.pack("=6I", *[0] * 6)), "capset")


def forbid_system_calls(is_alone):
    """
    Forbid system calls that no program under test needs; the network is among them.

    Args:
        is_alone (`bool`):
            Whether no other processes can be seen. Otherwise signals reach this process only.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in FORBIDDEN or sys.byteorder != "little":
        return
    code = b"".join(struct.pack("=HBBI", *each) for each in _filter(machine, None if is_alone else os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    _check(_libc().prctl(_SET_SECCOMP, ctypes.c_ulong(2), program, 0, 0), "seccomp")


def _filter(machine, only_signals_to):
    """The filter as instructions of classic BPF: operation, jump if true, jump if false, operand."""
    load, equal, at_least, any_bit, mask, answer = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allowed, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    number, architecture, first_argument, which = 0, 4, 16, list(_ARCHITECTURES).index(machine)
    code = [(load, 0, 0, architecture), (equal, 1, 0, _ARCHITECTURES[machine]), (answer, 0, 0, kill)]
    code += [(load, 0, 0, number), (at_least, 0, 1, 0x40000000), (answer, 0, 0, unknown)]
    code += [(equal, 0, 1, _CLONE3), (answer, 0, 0, unknown)]
    for each in FORBIDDEN[machine].values():
        code += [(equal, 0, 1, each), (answer, 0, 0, refuse)]
    rules = list(_BY_ARGUMENT)
    if only_signals_to is not None:
        calls = ((each, each) for each in _KILLS[which])
        rules += [("kill", each, 0, 0xFFFFFFFF, (only_signals_to,), False) for each in calls]
    for _, numbers, argument, bits, values, is_refused in rules:
        told = (refuse, allowed) if is_refused else (allowed, refuse)
        rule = [(load, 0, 0, first_argument + 8 * argument)]
        if values is None:
            rule += [(any_bit, 0, 1, bits), (answer, 0, 0, told[0])]
        else:
            rule += [(mask, 0, 0, bits)]
            for value in values:
                rule += [(equal, 0, 1, value), (answer, 0, 0, told[0])]
        rule += [(answer, 0, 0, told[1])]
        code += [(equal, 0, len(rule), numbers[which]), *rule]
    return [*code, (answer, 0, 0, allowed)]
