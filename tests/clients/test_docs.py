#!/usr/bin/python3
"""Man pages, completion and README against the program, the script and the sources. BIGHT names the binary."""
import os
import re
import subprocess
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BIGHT = os.path.abspath(os.environ.get("BIGHT") or os.path.join(ROOT, "build", "bight"))
OPTION = re.compile(r"(?<![\w-])(--?[a-z][a-z-]*)")


def text_of(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def run(*command):
    return subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                          timeout=120).stdout


def help_options(command="serve"):
    """Every option of `bight COMMAND --help`, and what is said about it."""
    entries = {}
    for line in run(BIGHT, command, "--help").splitlines():
        if re.match(r"  -", line):
            names, _, told = line.strip().partition("  ")
            current = OPTION.findall(names)
            entries |= {name: told for name in current}
        elif entries and line.startswith(" " * 10):
            entries |= {name: f"{entries[name]} {line.strip()}" for name in current}
    return entries


def man_section(page, name):
    return re.search(rf"^\.Sh {name}\n(.*?)(?=^\.Sh |\Z)", text_of(f"man/{page}"), re.M | re.S)[1]


def man_options(text):
    """mdoc writes --io as `Fl -io`, -v as `Fl v`."""
    return {f"-{flag}" for line in text.splitlines() if line.startswith(".")
            for flag in re.findall(r"\bFl (-?[a-z][a-z-]*)", line)}


def man_items(text):
    """Options at the head of an item of a list, and the text of that item."""
    items = {}
    for item in re.split(r"^\.It ", text, flags=re.M)[1:]:
        head, _, body = item.partition("\n")
        items |= {f"-{flag}": body for flag in re.findall(r"\bFl (-?[a-z][a-z-]*)", head)}
    return items


def complete(line, breaks=None):
    """What the completion offers behind this line."""
    script = 'source completion/bight; [[ ! $2 ]] || COMP_WORDBREAKS=$2; COMP_LINE=$1 COMP_POINT=${#1}; _bight; ' \
             'printf "%s\\n" "${COMPREPLY[@]}"'
    return run("bash", "--norc", "-c", script, "bash", line, breaks or "").split()


def code_blocks(text):
    return re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)


def commands_in(lines):
    """Command lines with their continuations and without their comments."""
    for line in re.sub(r"\\e?\n\s*", " ", lines).splitlines():
        line = re.sub(r"\s+#.*", "", line).strip()
        if line:
            yield line


def examples():
    """Command lines of the README and of the man pages."""
    found = [c for block in code_blocks(text_of("README.md")) for c in commands_in(block)]
    pages = [f"bight-{command}.1" for command in (*Attached.COMMANDS, "bench", "map", "serve")]
    for page in ("bight.1", *pages):
        for block in re.findall(r"^\.Bd [^\n]*\n(.*?)^\.Ed", man_section(page, "EXAMPLES"), re.M | re.S):
            found += commands_in(block)
    return found


class Serve(unittest.TestCase):
    def setUp(self):
        self.help = help_options()
        self.assertGreater(len(self.help), 10, self.help)

    def test_man_page_has_every_option_and_no_other(self):
        items = man_items(man_section("bight-serve.1", "OPTIONS"))
        self.assertEqual(sorted(items), sorted(self.help))
        for option, body in items.items():
            self.assertTrue(body.strip(), f"{option}: nothing is said about it")

    def test_man_page_names_only_options_that_exist(self):
        self.assertEqual(man_options(text_of("man/bight-serve.1")) - set(self.help), set())

    def test_man_page_has_the_defaults_of_the_help(self):
        items = man_items(man_section("bight-serve.1", "OPTIONS"))
        told = {option: re.search(r"default:? (\d+)", text) for option, text in self.help.items()}
        told = {option: match[1] for option, match in told.items() if match}
        self.assertGreaterEqual(len(told), 3, "the help tells no defaults any more?")
        for option, default in told.items():
            self.assertRegex(items[option], rf"Default: {default}\b", option)

    def test_man_page_tells_every_default(self):
        for option, body in man_items(man_section("bight-serve.1", "OPTIONS")).items():
            if option not in ("--nbd", "-h", "--help"):
                self.assertRegex(body, r"Default\b|is the default", option)

    def test_completion_has_every_option_and_no_other(self):
        self.assertEqual(sorted(complete("bight serve -")), sorted(self.help))

    def test_help_is_the_same_either_way(self):
        self.assertEqual(run(BIGHT, "serve", "--help"), run(BIGHT, "help", "serve"))


class OfAnImage(unittest.TestCase):
    """The commands that neither serve nor ask who serves."""

    COMMANDS = ("map", "bench")

    def test_man_page_has_every_option_and_no_other(self):
        for command in self.COMMANDS:
            with self.subTest(command):
                items = man_items(man_section(f"bight-{command}.1", "DESCRIPTION"))
                self.assertEqual(sorted(items), sorted(help_options(command)))

    def test_completion_has_every_option_and_no_other(self):
        for command in self.COMMANDS:
            with self.subTest(command):
                self.assertEqual(sorted(complete(f"bight {command} -")), sorted(help_options(command)))

    def test_man_page_of_bench_has_the_defaults_of_the_help(self):
        items, options = man_items(man_section("bight-bench.1", "DESCRIPTION")), help_options("bench")
        told = {option: re.search(r"default: (\d+)", text) for option, text in options.items()}
        told = {option: match[1] for option, match in told.items() if match}
        self.assertEqual(sorted(told), ["--depth", "--seconds"])
        for option, default in told.items():
            self.assertRegex(items[option], rf"Default: {default}\b", option)


class DevBench(unittest.TestCase):
    def test_man_page_has_every_option_and_no_other(self):
        options = {name for line in run("bench/run.py", "--help").splitlines() if line.startswith("  -")
                   for name in OPTION.findall(line.strip().partition("  ")[0])}
        self.assertGreater(len(options), 3)
        self.assertEqual(sorted(man_items(man_section("bight-bench.7", "DESCRIPTION"))), sorted(options))


# Options of other commands that a page speaks of
ELSEWHERE = {"switch": {"--offset", "--size-limit"}, "list": {"--lazy"}, "recover": {"--ublk"}}


class Attached(unittest.TestCase):
    """The commands for attached devices."""

    COMMANDS = ("attach", "list", "show", "set", "switch", "resize", "detach", "recover", "stats")

    def test_man_pages_have_every_option_and_no_other(self):
        for command in self.COMMANDS:
            with self.subTest(command):
                text = text_of(f"man/bight-{command}.1").split(".Sh LOSETUP")[0]
                self.assertEqual(sorted(man_options(text) - ELSEWHERE.get(command, set())),
                                 sorted(help_options(command)))

    def test_completion_has_every_option_and_no_other(self):
        for command in self.COMMANDS:
            with self.subTest(command):
                self.assertEqual(sorted(complete(f"bight {command} -")), sorted(help_options(command)))

    def test_every_option_of_losetup_has_a_counterpart(self):
        """What losetup here has: a row of the table names it."""
        table = text_of("man/bight-attach.1").split(".Sh LOSETUP")[1].split(".El")[0]
        options = set(re.findall(r"^ (?:-\w, )? *(--[a-z-]+)", run("losetup", "--help"), re.M))
        self.assertGreater(len(options), 12)
        # of losetup's own output
        options -= {"--help", "--version", "--noheadings", "--output", "--output-all", "--json", "--show"}
        named = {f"-{flag}" for flag in re.findall(r"\bFl (?:\w , Fl )*(-[a-z-]+)", table)}
        named |= {f"--{flag}" for flag in re.findall(r"-([a-z]+(?:-[a-z]+)*) ", table)}
        self.assertEqual(options - named, set())

    def test_settings_are_those_of_the_help(self):
        told = re.findall(r"^  ([a-z]+)=", run(BIGHT, "set", "--help"), re.M)
        self.assertEqual(sorted(complete("bight set disk ")), sorted(f"{key}=" for key in told))
        items = re.findall(r"^\.It Cm ([a-z]+) Ns = ", text_of("man/bight-set.1"), re.M)
        self.assertEqual(items, told)


class Overview(unittest.TestCase):
    def setUp(self):
        text = run(BIGHT, "--help")
        self.commands = re.findall(r"^  ([a-z]+) ", text, re.M)
        self.options = OPTION.findall(" ".join(line for line in text.splitlines() if line.startswith("  -")))
        self.assertIn("serve", self.commands)
        self.assertIn("--version", self.options)

    def test_man_page(self):
        text = text_of("man/bight.1")
        self.assertEqual(re.findall(r"^\.It Cm ([a-z]+)$", text, re.M), self.commands)
        self.assertEqual(sorted(man_items(man_section("bight.1", "DESCRIPTION"))), sorted(self.options))

    def test_completion(self):
        self.assertEqual(sorted(complete("bight ")), sorted(self.commands + self.options))


class Completion(unittest.TestCase):
    def test_words(self):
        for line, words in (
            ("bight ser", "serve"), ("bight help ", "attach list show set switch resize detach recover stats serve map bench"), ("bight help serve ", ""), ("bight nothing ", ""),
            ("bight serve --io ", "direct buffered null fault:"), ("bight serve --io b", "buffered"),
            ("bight serve --io=b", "buffered"), ("bight serve --map ", "linear fastfs"), ("bight serve --format ", "raw"),
            ("bight serve --ring ", "auto uring threads"), ("bight serve --block-size ", "512 1024 2048 4096"),
            ("bight serve --read-only --of", "--offset"), ("bight serve disk.img --nb", "--nbd"),
            ("bight serve --nbd ", "unix: localhost:10809 :10809"), ("bight serve --nbd unix:/", ""),
            ("bight serve --depth ", ""), ("bight serve ", ""),
            ("bight serve --io fault:read.", "read.error= read.delay= read.short="),
            ("bight serve --io fault:read.error=", ""), ("bight serve --io fault:io=", "direct buffered"),
        ):
            with self.subTest(line):
                self.assertEqual(complete(line), words.split())

    def test_what_stands_before_the_last_colon_or_equals_sign_stays(self):
        line = "bight serve --io fault:seed=1,write.error=0.1:ENO"
        self.assertEqual(complete(line), ["ENOSPC", "ENOMEM"])
        self.assertEqual(complete("bight serve --io fault:seed=1,write.t"), ["1,write.torn="])
        spec = "fault:seed=1,write.error=0.1:"
        self.assertEqual(complete(line, " \t\n"), [f"{spec}ENOSPC", f"{spec}ENOMEM"])

    def test_ends_that_the_program_takes(self):
        """Every value that is offered gets past the parser: what is then missing is a file."""
        for option in ("--io", "--map", "--format", "--ring", "--block-size"):
            for value in complete(f"bight serve {option} "):
                if value != "fastfs":  # which may not be possible here: tests/faults/test_fastfs.py
                    self.accepted(option, value)
        for key in complete("bight serve --io fault:"):
            value = {"io=": "direct", "seed=": "7", "after=": "7"}.get(key, "0.5:20" if "delay" in key else "0.5")
            self.accepted("--io", f"fault:{key}{value}")
        for name in complete("bight serve --io fault:any.error=0.5:"):
            self.accepted("--io", f"fault:any.error=0.5:{name}")

    def accepted(self, option, value):
        """The image is there, and the address is not: parsing an option comes first, opening the image next."""
        done = subprocess.run([BIGHT, "serve", option, value, "--read-only", os.path.join(ROOT, "LICENSE"),
                               "--nbd", "unix:/no/such/directory/sock"], stdin=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, timeout=120, check=False)
        with self.subTest(option=option, value=value):
            self.assertEqual(done.returncode, 1, done.stderr)
            # a machine that forbids io_uring says so, which is no matter of spelling
            self.assertRegex(done.stderr, r"/no/such/directory/sock|io_uring_setup")


class Readme(unittest.TestCase):
    def setUp(self):
        self.text = text_of("README.md")

    def test_begins_with_the_two_commands(self):
        self.assertEqual(list(commands_in(code_blocks(self.text)[0])), ["./dev demo", "./dev test"])

    def test_verbs_of_dev_exist(self):
        known = set(re.findall(r"^  ([a-z]+) ", run("./dev", "help"), re.M))
        for path in ("README.md", "CONTRIBUTING.md"):
            used = set(re.findall(r"\./dev ([a-z]+)", text_of(path)))
            self.assertGreater(len(used), 3)
            self.assertEqual(used - known, set(), path)

    def test_commands_of_bight_exist(self):
        options, known = set(help_options()), set(re.findall(r"^  ([a-z]+) ", run(BIGHT, "--help"), re.M))
        lines = [line[line.index("bight "):] for line in examples() if re.search(r"(^|[ /])bight [a-z]", line)]
        self.assertGreater(len(lines), 10)
        for line in lines:
            with self.subTest(line):
                self.assertIn(line.split()[1], known)
                command = line.split()[1]
                allowed = options if command == "serve" else set(help_options(command))
                self.assertEqual(set(OPTION.findall(line.split("|")[0])) - allowed, set())

    def test_options_in_the_text_exist(self):
        options = set(help_options()) | {"--help", "--version"}
        text = re.sub(r"^\|[^\n]*|^```.*?^```", "", self.text, flags=re.M | re.S)
        used = {word for quoted in re.findall(r"`([^`\n]+)`", text) if quoted.startswith(("--", "bight "))
                for word in OPTION.findall(quoted)}
        self.assertGreater(len(used), 2)
        self.assertEqual(used - options, set())

    def test_functions_in_the_picture_are_defined(self):
        picture = re.search(r"^## How a request flows\n.*?^```\n(.*?)^```", self.text, re.M | re.S)[1]
        names = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b(?!\()", picture))
        self.assertGreater(len(names), 25)
        sources = [text_of(os.path.join(folder, file)) for folder, _, files in os.walk(os.path.join(ROOT, "src"))
                   for file in files if file.endswith((".c", ".h"))]
        for name in sorted(names):
            definition = re.compile(rf"^[a-z][\w *]*\b{name}\([^;{{}}]*\)\n{{", re.M)
            with self.subTest(name):
                self.assertTrue(any(definition.search(source) for source in sources))

    def test_boxes_of_the_picture_are_folders(self):
        picture = re.search(r"^## How a request flows\n.*?^```\n(.*?)^```", self.text, re.M | re.S)[1]
        boxes = re.findall(r"^\|.* {8}(transport/nbd|core|map|io|ring) +\|", picture, re.M)
        self.assertEqual(boxes, ["transport/nbd", "core", "map", "io", "ring"])
        for box in boxes:
            self.assertTrue(os.path.isdir(os.path.join(ROOT, "src", box)))

    def test_paths_exist(self):
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
            text = text_of(name)
            paths = set(re.findall(r"\]\(([\w./-]+)\)", text))
            paths |= set(re.findall(r"`((?:src|tests|bench|man|completion)/[\w./-]*)`", text))
            for path in sorted(paths):
                with self.subTest(file=name, path=path):
                    self.assertTrue(os.path.exists(os.path.join(ROOT, path)))


if __name__ == "__main__":
    unittest.main()
