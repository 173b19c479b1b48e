"""The target of process-torture as it is seen from outside."""

import ctypes, os, signal, struct, subprocess, sys, threading, time

# As in target.c.
WORDS = (
    "magic errors quiet still beats maps forks threads piped streamed depth rounds0 rounds1 rounds2 rounds3 "
    "sent got got_outside disorder disorder_outside ticks ticks_begin tick_at resets"
).split()
GO_ON = "beats maps forks threads piped streamed rounds0 rounds1 rounds2 rounds3 got ticks".split()
QUIET = 8 * WORDS.index("quiet")
INTERVAL = 5_000_000
# All signals but SIGKILL, SIGSTKFLT and SIGSTOP.
AWAY = "%016x" % (~(1 << 8 | 1 << 15 | 1 << 18) & (1 << 64) - 1)
# Nothing takes so long: what does hangs.
LONG = 60


class Wrong(Exception):
    pass


def wrong(what):
    raise Wrong(what)


def until(what, is_so):
    end = time.monotonic() + LONG
    while not is_so():
        if time.monotonic() > end:
            wrong("waited in vain: " + what)
        time.sleep(0.003)


def text(path):
    try:
        with open(path) as f:
            return f.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def state(pid):
    return text("/proc/%d/stat" % pid).rpartition(")")[2].strip()[:1]


def descendants(pid):
    out = []
    for child in text("/proc/%d/task/%d/children" % (pid, pid)).split():
        out += [int(child)] + descendants(int(child))
    return out


def mine(base):
    """Processes of this suite: those with a path in its directory among their arguments, and copies of the target."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/cmdline" % name, "rb") as f:
                ours = any(a.startswith(base.encode() + b"/") for a in f.read().split(b"\0"))
            if int(name) != os.getpid() and (ours or os.readlink("/proc/%s/exe" % name) == base + "/target"):
                found.append(int(name))
        except OSError:
            pass
    return found


class Target:
    def __init__(self, pid, at, churners, signal_number=0, child=None):
        self.pid, self.at, self.churners, self.signal, self.child = pid, at, churners, signal_number, child
        self.mem = os.open("/proc/%d/mem" % pid, os.O_RDWR)

    @staticmethod
    def start(base, megabytes):
        child = subprocess.Popen(
            [base + "/target", str(megabytes)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=open(base + "/target.err", "w")
        )
        at, churners, number = child.stdout.readline().split()
        # The end of a pipe is a stranger's.
        child.stdout.close()
        return Target(child.pid, int(at, 16), int(churners), int(number), child)

    def words(self):
        try:
            return dict(zip(WORDS, struct.unpack("%dQ" % len(WORDS), os.pread(self.mem, 8 * len(WORDS), self.at))))
        except (OSError, struct.error):
            wrong("process %d has ended: %s" % (self.pid, self.child and self.child.poll()))

    def rounds(self):
        return [v for k, v in self.words().items() if k.startswith("rounds")]

    def goes_on(self, when, copy=False):
        """All that it does goes on, and nothing of it was wrong. A copy finds its connection reset, and makes another."""
        first = self.words()
        # Of a copy more is looked at: its writers read all of their memory.
        by = {"beats": 5}
        if copy:
            by.update({k: 150 for k in GO_ON if k.startswith("rounds")})
        left = list(GO_ON)
        end = time.monotonic() + LONG
        while left:
            w = self.words()
            self.sound(w, when, copy)
            left = [k for k in left if w[k] < first[k] + by.get(k, 1)]
            if time.monotonic() > end:
                wrong("%s: process %d does not go on with %s: %s" % (when, self.pid, left, w))
            time.sleep(0.002)
        self.sound(self.words(), when, copy)

    def sound(self, w, when, copy):
        if w["errors"] or w["disorder"] or w["disorder_outside"]:
            at = self.at + 8 * len(WORDS)
            said = os.pread(self.mem, 256, at).split(b"\0")[0].decode()
            wrong("%s: process %d says: %s (%s)" % (when, self.pid, said, w))
        if w["resets"] > (2 if copy else 0):
            wrong("%s: %d connections were reset" % (when, w["resets"]))

    def driven(self):
        """Whether its first thread is away from its own code: all it can block is blocked but SIGSTKFLT."""
        return "SigBlk:\t" + AWAY in text("/proc/%d/status" % self.pid)

    def away(self):
        """Whether that is so of any thread, or somebody traces it."""
        looks = [text("/proc/%d/task/%s/status" % (self.pid, t)) for t in os.listdir("/proc/%d/task" % self.pid)]
        lines = [line.split() for look in looks for line in look.splitlines()]
        return any(w[0] == "SigBlk:" and w[1] == AWAY or w[0] == "TracerPid:" and w[1] != "0" for w in lines if w)

    def look(self):
        """Its mappings, descriptors and memory in KiB, while it makes none."""
        os.pwrite(self.mem, struct.pack("Q", 1), self.at + QUIET)
        try:
            until("a quiet moment", lambda: self.words()["still"] == self.churners)
            # Its stack grows by itself.
            maps = [line for line in text("/proc/%d/maps" % self.pid).splitlines() if "[stack]" not in line]
            fds = sorted("%s %s" % (n, os.readlink("/proc/%d/fd/%s" % (self.pid, n))) for n in os.listdir("/proc/%d/fd" % self.pid))
            status = text("/proc/%d/status" % self.pid)
            anon = int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))
            return maps, fds, anon, sorted(os.listdir("/proc/%d/task" % self.pid))
        finally:
            os.pwrite(self.mem, struct.pack("Q", 0), self.at + QUIET)
            until("its work", lambda: self.words()["still"] == 0)

    def remember(self):
        self.first = self.look()

    def clean(self, when):
        (maps, fds, anon, tasks), (maps2, fds2, anon2, tasks2) = self.first, self.look()
        if maps != maps2:
            new, gone = [m for m in maps2 if m not in maps], [m for m in maps if m not in maps2]
            wrong("%s: other mappings: new\n%s\ngone\n%s" % (when, "\n".join(new), "\n".join(gone)))
        if fds != fds2 or tasks != tasks2:
            wrong("%s: %s and %s instead of %s and %s" % (when, fds2, tasks2, fds, tasks))
        # Blocks of huge pages come and go.
        if anon2 > anon + 8192:
            wrong("%s: %d KiB of memory instead of %d" % (when, anon2, anon))

    def exact(self):
        """Each expiration of its timer was counted: a lost one would be missing from then on."""

        def all_there():
            w = self.words()
            due = (w["tick_at"] - w["ticks_begin"]) // INTERVAL
            if w["ticks"] > due + 1:
                wrong("%d ticks, and %d were due" % (w["ticks"], due))
            return w["ticks"] == due

        until("all ticks of the timer", all_there)
        until("all signals to itself", lambda: (lambda w: w["sent"] - w["got"] <= 16)(self.words()))

    def kill(self):
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if self.child:
            self.child.wait()

    def evidence(self, to):
        with open(to + "/target", "w") as out:
            for name in ["status", "maps", "stat"]:
                out.write("--- %s\n%s" % (name, text("/proc/%d/%s" % (self.pid, name))))
            for t in os.listdir("/proc/%d/task" % self.pid) if state(self.pid) else []:
                for name in ["wchan", "syscall", "status"]:
                    out.write("--- %s %s\n%s\n" % (t, name, text("/proc/%d/task/%s/%s" % (self.pid, t, name))))


class Sender(threading.Thread):
    """Queues signals with rising numbers, until it is stopped."""

    def __init__(self, pid, number):
        super().__init__(daemon=True)
        self.pid, self.number, self.sent, self.ends = pid, number, 0, False
        self.start()

    def run(self):
        sigqueue = ctypes.CDLL(None).sigqueue
        sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
        while not self.ends:
            # If too many wait, this one is sent later.
            if sigqueue(self.pid, self.number, self.sent) == 0:
                self.sent += 1
            time.sleep(0.002)

    def stop(self):
        self.ends = True
        self.join()
        return self.sent
