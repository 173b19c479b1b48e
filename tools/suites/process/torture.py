"""What process-torture does with its target. Usage: torture.py UMLCTL DIRECTORY SNAPSHOTS KILLS"""

import json, os, random, shutil, signal, subprocess, sys, tempfile, time
from target import Sender, Target, descendants, mine, state, until, wrong

umlctl, base = sys.argv[1], sys.argv[2]
snapshots, kills = int(sys.argv[3]), int(sys.argv[4])
# Refusals that a process which makes children and threads may get, with advice to try again.
AGAIN = ("add --tree", "ended meanwhile", "try again", "a table of descriptors of its own", "a child of vfork", "outside the tree has open", "is it still running?", "has ended while")
# A whole sequence: the parent of each, by its place in it.
CHAIN = 4


def percentiles(what, values):
    values = sorted(values)
    if values:
        at = lambda q: values[min(len(values) - 1, int(len(values) * q))] / 1e3
        print("    %-10s p50 %8.2f  p90 %8.2f  p99 %8.2f  max %8.2f ms" % (what, at(0.5), at(0.9), at(0.99), values[-1] / 1e3))


def run(*args):
    """Ends in any case: what takes longer hangs."""
    return subprocess.run([umlctl, *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


def good(*args):
    done = run(*args)
    if done.returncode != 0:
        wrong("umlctl %s: %d: %s%s" % (" ".join(args), done.returncode, done.stdout, done.stderr))
    return done.stdout


def snapshot(t, path, *more):
    """Takes one; gives its report, and how often it was refused before."""
    for refused in range(200):
        done = run("snapshot", "--json", "--pid", str(t.pid), path, *more)
        if done.returncode == 0:
            return json.loads(done.stdout), refused
        if not any(a in done.stderr for a in AGAIN):
            wrong("snapshot: %d: %s" % (done.returncode, done.stderr))
        if os.path.exists(path):
            wrong("a refused snapshot is there: " + done.stderr)
    wrong("refused 200 times: " + done.stderr)


def beside(t, path):
    """Resumes it beside the original; the copy must find itself right, and go on with everything it does."""
    pid = json.loads(good("resume", path, "--detach", "--json"))["pid"]
    # One above it: the first process of its own namespaces.
    first = int(open("/proc/%d/stat" % pid).read().rsplit(")", 1)[1].split()[1])
    copy = Target(pid, t.at, t.churners)
    try:
        copy.goes_on("the copy of " + path, copy=True)
    finally:
        copy.kill()
    until("the end of a copy", lambda: state(pid) == "" and (first == 1 or state(first) in ("", "Z")))


def many(t):
    reports, refused, sequels, verified, copies = [], 0, 0, 0, 0
    chain = []
    for i in range(snapshots):
        if i % CHAIN == 0:
            for old in chain:
                shutil.rmtree(old)
            chain = []
        path = "%s/s%d" % (base, i)
        # Every other place is a sequel of the one before.
        more = ["--since", chain[-1]] if i % CHAIN > 1 else []
        # With its children, every few; then none is refused for them.
        more += ["--tree"] if i % 5 == 0 else []
        more += ["--stop-and-copy"] if i % 20 == 9 else []
        report, n = snapshot(t, path, *more)
        reports.append(report)
        refused, sequels = refused + n, sequels + ("--since" in more)
        chain.append(path)
        if i % 10 in (3, 5):
            good("verify", path)
            verified += 1
        if i % 40 in (3, 5) or i == snapshots - 1:
            beside(t, path)
            copies += 1
        t.goes_on(path)
        if i % 100 == 99:
            print("    %d, %s" % (i + 1, time.strftime("%T")), flush=True)
    for old in chain:
        shutil.rmtree(old)
    print("    %d snapshots, %d of them of only the changes; %d times refused for a child or thread just made" % (snapshots, sequels, refused))
    print("    %d read whole, %d resumed beside it" % (verified, copies))
    # Stopped and copied is what a 20th of them were.
    tracked = [r for i, r in enumerate(reports) if i % 20 != 9]
    for what in ("pause", "prepare", "total"):
        percentiles(what, [r[what + "_us"] for r in tracked])
    totals = sorted(r["total_us"] for r in tracked)
    return totals[len(totals) // 2] / 1e6 if totals else 0.3


def end(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def caught(t, saver):
    """Waits until a thread of the target is away from its own code, or the saver has ended; gives the guardian, if any."""
    guardians = []
    while not t.driven() and saver.poll() is None:
        guardians = guardians or descendants(saver.pid)
    return guardians


def killed(t, longest):
    """kill -9 of umlctl at any moment, or as soon as it drives the target; every other time together with its guardian."""
    ended, published, stood, rescued = 0, 0, 0, 0
    chance = random.Random(17)
    for i in range(kills):
        path = "%s/k%d" % (base, i)
        saver = subprocess.Popen(
            [umlctl, "snapshot", "--json", "--pid", str(t.pid), path, "--tree"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        guardians = []
        time.sleep(chance.random() * longest)
        if i % 4 in (1, 2):
            guardians = caught(t, saver)
        if i % 2:
            for guardian in guardians or descendants(saver.pid):
                end(guardian)
        saver.kill()
        ended += saver.wait() == -signal.SIGKILL
        if i % 2:
            # Without a guardian it may stand; then rescue is for all that are left.
            away = t.away()
            stood += away
            said = json.loads(good("rescue", "--json"))
            if said["failed"]:
                wrong("rescue: %s" % said)
            put_right = [p for p in said["processes"] if p["pid"] == t.pid and p["outcome"].startswith("put right")]
            rescued += len(put_right)
            if away and not put_right:
                wrong("%s: it stands, and rescue says %s" % (path, said))
        until("%s: the target's masks, and nobody who traces it" % path, lambda: not t.away())
        t.goes_on(path)
        if os.path.exists(path + "/manifest"):
            published += 1
            good("verify", path)
        shutil.rmtree(path, ignore_errors=True)
        if i % 20 == 19:
            t.clean(path)
        if i % 100 == 99:
            print("    %d, %s" % (i + 1, time.strftime("%T")), flush=True)
    print("    %d kills of umlctl, every other one also of its guardian: %d found it at work; %d snapshots were complete" % (kills, ended, published))
    print("    %d times the target stood still for good without a guardian, and rescue put it right %d times" % (stood, rescued))


def main():
    t = Target.start(base, 64)
    sender = Sender(t.pid, t.signal)
    ok = False
    try:
        t.goes_on("at first")
        # Until all memory has been written once, and its stack has its size.
        until("all memory", lambda: t.words()["depth"] == 512 and min(t.rounds()) > 200)
        t.remember()
        print("%d snapshots in a row" % snapshots, flush=True)
        longest = many(t)
        t.clean("after the snapshots")
        print("kill -9 of umlctl, %d times" % kills, flush=True)
        killed(t, longest * 1.2)
        t.clean("after the kills")
        sent = sender.stop()
        until("the last signal", lambda: t.words()["got_outside"] == sent)
        t.exact()
        w = t.words()
        print("the target's own account")
        print("    %d and %d queued signals, each once and in order; %d ticks of 5 ms, none missing" % (w["got"], sent, w["ticks"]))
        print("    %d rounds of writers, %d of mappings, %d children, %d threads, %d and %d words of streams" % (sum(t.rounds()), w["maps"], w["forks"], w["threads"], w["piped"], w["streamed"]))
        t.kill()
        until("the end of all", lambda: not mine(base))
        left = os.listdir(base)
        if sorted(left) != ["target", "target.err"]:
            wrong("left behind: %s" % left)
        if os.path.exists("/run/umlctl/journal/%d" % t.pid):
            wrong("its journal is left")
        ok = True
        print("all right: no mapping, process, file, descriptor or memory is left behind")
    finally:
        sender.stop()
        if not ok:
            to = tempfile.mkdtemp(prefix="umlctl-process-failed.", dir="/var/tmp")
            t.evidence(to)
            shutil.copy(base + "/target.err", to)
            for name in os.listdir(base):
                if os.path.isdir(base + "/" + name):
                    shutil.copytree(base + "/" + name, to + "/" + name)
            print("evidence is in " + to, file=sys.stderr)
        t.kill()
        for pid in mine(base):
            end(pid)


main()
