#!/usr/bin/python3
"""usage: ./dev bench [NAME...] [--quick] [--OPTION...]

Runs the measurements in bench/ (all, or those named) one after the other and joins what they say to one report, in
bench/results/DATE/: report.md, and for each of them a directory with results.json, table.md and plots. One that fails is
told in the report, and the next one begins.

  --quick              all of them in about 15 minutes, with smaller images and shorter runs
  --list               what there is
  --part-seconds N     stop one that takes longer (default: 420 with --quick, else never)
  -h, --help

Other options are for the measurements: ./dev bench NAME --help. bight-bench(7) says what the rows mean.
"""
import ctypes
import glob
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

sys.dont_write_bytecode = True
import benchlib as b  # noqa: E402

# In the order of the report: the title, and what --quick means.
PARTS = {
    "loop": ("1. Multi-queue loop", ["--quick"]),
    "aio": ("2. Direct I/O and AIO", ["--quick"]),
    "fastfs": ("3. fastfs", ["--fs=ext4", "--rounds=3", "--seconds=0.5", "--ramp=0.1", "--image-size=200M",
                             "--rows=randread,randwrite,randwrite-fragmented"]),
    "writeback": ("4. Delayed allocation", ["--fs=xfs", "--rounds=3", "--writes=30000", "--image-size=1G",
                                            "--rows=random,preallocated",
                                            "--contestants=bight,bight-writeback,bight-writeback-1G,loop-direct,nbdkit"]),
    "transports": ("5. Transports", ["--quick"]),
    "scale": ("6. Scale", ["--quick"]),
    "nbd": ("NBD", ["--fs=ext4", "--rounds=3", "--seconds=0.5", "--ramp=0.1", "--image-size=256M",
                    "--rows=randread,randwrite,read128k"]),
    "vhost-user": ("vhost-user", ["--rounds=3", "--seconds=0.4", "--ramp=0.1", "--image-size=256M",
                                  "--rows=randread-d1,randread-d64,randwrite-d64", "--contestants=bight,qsd,loop,raw"]),
    "device": ("FUSE and the loop device", ["--fs=ext4", "--rounds=3", "--seconds=0.5", "--ramp=0.1", "--image-size=256M",
                                            "--rows=randread,randwrite,randread-1"]),
    "ublk": ("ublk", ["--quick"]),
}
QUICK_SECONDS = 420


def parse(argv):
    """Names come first; what is not known here is for the measurements."""
    names = []
    while argv and not argv[0].startswith("-"):
        names.append(argv.pop(0))
    args = SimpleNamespace(names=names, rest=[], is_quick=False, seconds=None)
    while argv:
        word = argv.pop(0)
        if word in ("-h", "--help") and not names:
            print(__doc__.strip())
            sys.exit(0)
        if word == "--list":
            print(*(f"{name:<12} {title}" for name, (title, _) in PARTS.items()), sep="\n")
            sys.exit(0)
        if word == "--quick":
            args.is_quick = True
        elif word == "--part-seconds" and argv and argv[0].isdigit() and int(argv[0]):
            args.seconds = int(argv.pop(0))
        elif word.startswith("--part-seconds"):
            raise b.BenchError("--part-seconds: give a number of seconds")
        else:
            args.rest.append(word)
    unknown = [n for n in names if n not in PARTS]
    if unknown:
        raise b.BenchError(f"no measurement '{unknown[0]}'; there are {' '.join(PARTS)}")
    args.names = args.names or list(PARTS)
    args.seconds = args.seconds or (QUICK_SECONDS if args.is_quick else None)
    return args


def die_with_parent():
    """The kernel tells a measurement when we are killed, so that it undoes what it has set up."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def run_part(name, args, out):
    """What came of it, in words; "" when all went well."""
    argv = [f"{b.ROOT}/bench/{name}", *(PARTS[name][1] if args.is_quick else []), *args.rest]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent,
                               env=os.environ | {"BIGHT_BENCH_RESULTS": out})
    try:
        status = process.wait(args.seconds)
    except subprocess.TimeoutExpired:
        stop(process)
        return f"stopped after {args.seconds} s"
    except KeyboardInterrupt:
        stop(process)
        raise
    if status == 130:
        raise KeyboardInterrupt
    return "" if not status else f"exit status {status}"


def stop(process):
    process.send_signal(signal.SIGTERM)
    process.wait()  # it undoes what it has set up, which may take as long as it takes


# ---- the report

def tables(text):
    """The lines of each Markdown table, as lists of cells."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        yield [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]


def aims_of(text):
    """The lines of the tables that have a verdict, each with the heading it stands under."""
    found = []
    head, *sections = re.split(r"^## ", text, flags=re.M)
    for section in ("\n" + head, *sections):
        heading = section.partition("\n")[0].removeprefix("Aims")
        for table in tables(section):
            if table[0] == b.AIMS_HEADER:
                found += [[heading, *line] for line in table[2:]]
    return found


def plots_of(directory, title):
    """Those that the measurement has made; where there is none, one of its requests."""
    if not glob.glob(directory + "/*.svg"):
        runs = json.loads(b.get(directory + "/results.json"))["runs"]
        runs = [r for r in runs if r.get("iops") and "failed" not in r]
        for kind in dict.fromkeys(r.get("file_system", "") for r in runs):
            here = [r for r in runs if r.get("file_system", "") == kind]
            rows = [SimpleNamespace(name=n, unit="kIOPS", of=lambda r: r["iops"] / 1000)
                    for n in dict.fromkeys(r["row"] for r in here)]
            who = [SimpleNamespace(name=n) for n in dict.fromkeys(r["contestant"] for r in here)]
            b.plot(f"{directory}/{kind or 'all'}.svg", f"{title} {kind}".strip(), here, rows, who)
    return sorted(glob.glob(directory + "/*.svg"))


def write_report(out, head, results):
    """results: {name: (what went wrong, seconds)}. Written anew after each part."""
    summary, claims, undecided, bodies = [], [], [], []
    for name, (wrong, seconds) in results.items():
        title, directory = PARTS[name][0], f"{out}/{name}"
        text = b.get(directory + "/table.md") if os.path.exists(directory + "/table.md") else ""
        plots = []
        try:
            plots = plots_of(directory, title)
        except (OSError, ValueError, KeyError, b.BenchError) as error:
            wrong = wrong or f"no plot: {error}"
        aims = aims_of(text)
        count = {word: sum(line[-1].startswith(word) for line in aims) for word in ("met", "missed", "undecided")}
        summary.append([title, wrong or "ran", f"{seconds:.0f}", *count.values()])
        claims += [[title, *line] for line in aims]
        undecided += [f"{title}: {' '.join(line[:3])}: {line[-2]}" for line in aims if line[-1].startswith("undecided")]
        body = re.sub(r"^# .*\n+", "", text)
        body = re.sub(r"^(#+) ", r"#\1 ", body, flags=re.M)
        bodies.append(f"## {title}\n\n`bench/{name}`" + (f": **{wrong}**" if wrong else "") + f"\n\n{body}\n"
                      + "".join(f"![{title}]({os.path.relpath(p, out)})\n\n" for p in plots))
    text = head + "## Short form\n\n" + b.markdown(["measurement", "", "seconds", "met", "missed", "undecided"], summary)
    text += "\n" + b.markdown(["measurement", "where", *b.AIMS_HEADER], claims)
    text += ("\nAn aim is met or missed when all rounds, three at least, are on one side of it. Too noisy, or too few rounds, "
             "to be decided:\n\n" + ("".join(f"- {line}\n" for line in undecided) or "- none\n") + "\n")
    b.put(out + "/report.md", text + "\n".join(bodies))


def main():
    args = parse(sys.argv[1:])
    if "--help" in args.rest or "-h" in args.rest:
        return subprocess.run([f"{b.ROOT}/bench/{args.names[0]}", "--help"]).returncode
    b.need(root=True, tools=("fio", "gnuplot"))
    out = os.path.dirname(b.results_dir("."))
    facts, commit = b.machine(), b.version("git", "-C", b.ROOT, "describe", "--always", "--dirty")
    head = (f"# bight beside its rivals, {time.strftime('%Y-%m-%d %H:%M %z')}\n\n{b.machine_text(facts)}; "
            f"bight {commit}. Before the start others used {facts['others_cpu_percent']:.0f} % of one core. "
            f"bight-bench(7) says what the rows mean.\n\n    ./dev bench {' '.join(sys.argv[1:])}\n\n")
    results = {}
    try:
        for name in args.names:
            b.say(f"bench: {PARTS[name][0]} ({name})")
            began = time.monotonic()
            results[name] = ("interrupted", 0)
            wrong = run_part(name, args, out)
            results[name] = (wrong, time.monotonic() - began)
            write_report(out, head, results)
    except KeyboardInterrupt:
        write_report(out, head, results)
        raise
    b.say(f"bench: {os.path.relpath(out)}/report.md is the report")
    return 1 if any(wrong for wrong, _ in results.values()) else 0


if __name__ == "__main__":
    b.main_guard(main)
