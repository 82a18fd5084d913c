#!/usr/bin/python3
"""bight bench, and what ./dev bench makes of its measurements. BIGHT names the binary."""
import contextlib
import hashlib
import io
import json
import os
import sys
import unittest
from unittest import mock

sys.path[:0] = [os.path.join(os.path.dirname(os.path.abspath(__file__)), *up) for up in ([], ["..", "..", "bench"])]
sys.dont_write_bytecode = True
import benchlib
import harness
import run as bench_run
from harness import K, M


class Bench(harness.Case):
    """Of one image, in the program."""

    def bench(self, *args, status=0):
        done = harness.run(harness.BIGHT, "bench", "--seconds", "0.05", *args, status=None)
        self.assertEqual(done.returncode, status, done.stderr)
        self.assertNotRegex(done.stderr, harness.SANITIZER)
        self.stderr = done.stderr
        return done.stdout

    def digest(self, path):
        return hashlib.sha256(harness.read_file(path)).hexdigest()

    def test_every_map_and_io_is_measured_or_says_why_not(self):
        image = self.image(harness.pattern(2 * M, 1))
        before = self.digest(image)
        for ring in harness.rings():
            results = json.loads(self.bench("--json", "--ring", ring, image))
            ways = {(r["map"], r["io"]) for r in results}
            self.assertEqual(ways, {("linear", "direct"), ("linear", "buffered"), ("fastfs", "direct"), ("linear", "null")})
            for result in results:
                if "refused" in result:
                    self.assertEqual(result["map"], "fastfs")
                    self.assertTrue(result["refused"])
                else:
                    self.assertGreater(result["iops"], 0)
                    self.assertGreater(result["p99_us"], 0.05)  # none takes no time
                    self.assertGreaterEqual(result["p99_us"], result["p50_us"])
                    self.assertIn(result["load"], ("randread", "read"))
        self.assertEqual(self.digest(image), before)

    def test_a_table_for_people(self):
        lines = self.bench("--depth", "3", "--queues", "5", self.image(size=1 * M)).splitlines()
        self.assertRegex(lines[0], r"^map +io +load +bytes +IOPS +MB/s +p50 us +p99 us$")
        self.assertTrue(any(line.split()[:3] == ["linear", "direct", "randread"] for line in lines))

    def test_writes_only_when_told_to(self):
        image = self.image(harness.pattern(1 * M, 2))
        before = self.digest(image)
        loads = {r.get("load") for r in json.loads(self.bench("--json", "--write", image))}
        self.assertLessEqual({"randread", "read", "randwrite", "write"}, loads)
        self.assertNotEqual(self.digest(image), before)

    def test_an_image_that_is_attached_for_writing_is_refused(self):
        image = self.image(size=1 * M)
        with harness.Server(image):
            self.bench(image, status=1)
            self.assertEqual(self.stderr.count("\n"), 1, self.stderr)

    def test_mistakes_get_one_line(self):
        image, small = self.image(size=1 * M), self.image(size=8 * K, name="small.img")
        for status, args in ((2, []), (2, [image, image]), (2, ["--depth", "0", image]),
                             (2, ["--depth", "1025", image]), (2, ["--queues", "65", image]),
                             (2, ["--seconds", "0", image]), (2, ["--seconds", "nan", image]),
                             (2, ["--seconds", "1e9", image]), (2, ["--ring", "no", image]), (2, ["--no", image]),
                             (2, ["--depth"]), (1, [self.path("none")]), (1, [small]), (1, [self.dir]),
                             (1, [self.image(name="empty")])):
            with self.subTest(args):
                self.bench(*args, status=status)
                self.assertEqual(self.stderr.count("\n"), 1, self.stderr)


class Verdicts(unittest.TestCase):
    def test_decided_only_by_three_rounds_on_one_side(self):
        self.assertEqual(benchlib.verdict((2, 1.5, 3), 1.5, True, 3), "met")
        self.assertEqual(benchlib.verdict((2, 1.4, 3), 1.5, True, 3), "undecided")
        self.assertEqual(benchlib.verdict((2, 1.5, 3), 1.5, True, 2), "undecided")
        self.assertEqual(benchlib.verdict((1, 0.9, 1.1), 1.5, True, 3), "missed")
        self.assertEqual(benchlib.verdict((1, 0.9, 1.1), 1.5, False, 3), "met")
        self.assertEqual(benchlib.verdict(None, 1.5, False, 3), "not measured")

    def test_ratios_are_of_rounds_that_both_have(self):
        self.assertEqual(benchlib.ratios({0: 4, 1: 9, 2: 8}, {0: 2, 1: 3}), (8 / 2.5, 2, 3))
        self.assertIsNone(benchlib.ratios({0: 1}, {1: 1}))


class Report(harness.Case):
    """./dev bench, with measurements that are not any."""

    GOOD = """#!/bin/sh
mkdir -p "$BIGHT_BENCH_RESULTS/good" && cd "$BIGHT_BENCH_RESULTS/good"
printf '# bench good\\n\\ntext\\n\\n## place\\n\\n| row | aim | wanted | measured | verdict |\\n| - | - | - | - | - |\\n' >table.md
printf '| a | speed | ≥ 1 | 2 | met |\\n| b | speed | ≥ 1 | 1 (0–2) | undecided |\\n' >>table.md
printf '{"runs": [{"row": "a", "contestant": "x", "round": 0, "iops": 5}]}' >results.json
echo "$*" >args
"""
    BAD = "#!/bin/sh\nexit 3\n"
    SLOW = "#!/bin/sh\ntrap 'touch \"$BIGHT_BENCH_RESULTS/undone\"; exit 1' TERM\nwhile :; do sleep 0.01; done\n"

    def setUp(self):
        super().setUp()
        if not harness.have("gnuplot"):
            self.skipTest("not installed: gnuplot")
        os.mkdir(self.path("bench"))
        for name, text in (("good", self.GOOD), ("bad", self.BAD), ("slow", self.SLOW)):
            harness.write_file(self.path(f"bench/{name}"), text.encode())
            os.chmod(self.path(f"bench/{name}"), 0o755)

    def dev_bench(self, *argv, env=None):
        out = self.path("results")
        parts = {name: (f"Title {name}", ["--small"]) for name in ("bad", "slow", "good")}
        facts = {"cpus": 1, "virtual": False, "cpu": "x", "memory_mib": 1, "kernel": "6", "others_cpu_percent": 0}
        with mock.patch.object(bench_run.b, "ROOT", self.dir), mock.patch.object(bench_run, "PARTS", parts), \
             mock.patch.object(bench_run.b, "need"), mock.patch.object(bench_run.b, "machine", lambda: facts), \
             mock.patch.dict(os.environ, {"BIGHT_BENCH_RESULTS": out}), mock.patch.object(sys, "argv", ["bench", *argv]), \
             contextlib.redirect_stderr(io.StringIO()):
            status = bench_run.main()
        return status, harness.read_file(out + "/report.md").decode(), out

    def test_one_that_fails_is_told_and_the_others_go_on(self):
        status, report, out = self.dev_bench("bad", "slow", "good", "--part-seconds", "1", "--more")
        self.assertEqual(status, 1)
        self.assertRegex(report, r"\| Title bad +\| exit status 3 ")
        self.assertRegex(report, r"\| Title slow +\| stopped after 1 s ")
        self.assertRegex(report, r"\| Title good +\| ran +\| \d+ +\| 1 +\| 0 +\| 1 ")
        self.assertIn("- Title good: place b speed: 1 (0–2)", report)
        self.assertIn("![Title good](good/all.svg)", report)
        self.assertTrue(os.path.exists(out + "/undone"))
        self.assertTrue(os.path.getsize(out + "/good/all.svg"))
        self.assertEqual(harness.read_file(out + "/good/args"), b"--more\n")

    def test_quick_is_what_each_says_it_is(self):
        status, report, out = self.dev_bench("good", "--quick")
        self.assertEqual((status, harness.read_file(out + "/good/args")), (0, b"--small\n"))
        self.assertIn("./dev bench good --quick", report)

    def test_a_name_that_is_none_is_refused(self):
        with self.assertRaisesRegex(benchlib.BenchError, "no measurement 'x'"):
            bench_run.parse(["x"])


class VuLoad(harness.Case):
    def test_it_is_given_of_the_options_of_fio_what_it_knows(self):
        build, sock = os.environ.get("BIGHT_BUILD") or os.path.dirname(harness.BIGHT), self.path("sock")
        self.serve(self.image(size=4 * M), args=["--vhost-user", sock], nbd=[])
        target = benchlib.Target([], None, [os.path.join(build, "vu_load"), "--socket", sock])
        run = benchlib.vu_load(target, benchlib.Row("row", "randwrite", "4k", 4), 0.1, 0,
                               ["--group_reporting", "--numjobs=1", "--fsync=8"])
        self.assertGreater(run["iops"], 0)
        self.assertIn("--flush-every=8", run["argv"])


class Parts(unittest.TestCase):
    def test_every_measurement_is_part_of_the_report_and_of_the_man_page(self):
        there = {name for name in os.listdir(os.path.join(benchlib.ROOT, "bench"))
                 if "." not in name and os.access(os.path.join(benchlib.ROOT, "bench", name), os.X_OK)
                 and os.path.isfile(os.path.join(benchlib.ROOT, "bench", name))}
        self.assertEqual(there, set(bench_run.PARTS))
        page = harness.read_file(os.path.join(benchlib.ROOT, "man", "bight-bench.7")).decode()
        headings = " ".join(line for line in page.splitlines() if line.startswith(".Ss "))
        for name in there:
            self.assertRegex(headings, rf"\b{name}\b")

    def test_what_quick_says_is_understood(self):
        for name, (_, argv) in bench_run.PARTS.items():
            told = harness.run(os.path.join(benchlib.ROOT, "bench", name), "--help").stdout
            for word in argv:
                self.assertRegex(told, rf"(?m)^  {word.partition('=')[0]}\b", name)


if __name__ == "__main__":
    unittest.main()
