"""The hot path allocates nothing and takes no lock; and the check for that sees it when it does."""

import os
import subprocess
import tempfile
import unittest

CHECK = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "hot_symbols")
BUILD = os.environ.get("BIGHT_BUILD") or os.path.dirname(os.environ["BIGHT"])

FORBIDDEN = ["malloc", "calloc", "realloc", "free", "posix_memalign", "aligned_alloc", "strdup", "pthread_mutex_lock",
             "pthread_mutex_unlock", "pthread_rwlock_rdlock", "pthread_spin_lock", "pthread_cond_wait",
             "pthread_cond_signal"]


class HotSymbols(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def check(self, *libraries):
        return subprocess.run([CHECK, *libraries], stderr=subprocess.PIPE, text=True, check=False)

    def library(self, *symbols):
        """A library of one object for each symbol, which calls it, and one that calls memcpy."""
        path = os.path.join(self.folder, "libsample.a")
        objects = []
        for symbol in ("memcpy", *symbols):
            objects.append(os.path.join(self.folder, f"{symbol}.o"))
            subprocess.run(["cc", "-c", "-fno-builtin", "-x", "c", "-o", objects[-1], "-"], check=True, text=True,
                           input=f"void {symbol}(void); void f(void); void f(void) {{ {symbol}(); }}")
        subprocess.run(["ar", "cr", path, *objects], check=True)
        return path

    def test_the_hot_path_neither_allocates_nor_locks(self):
        result = self.check(os.path.join(BUILD, "libhot.a"))
        self.assertEqual((result.returncode, result.stderr), (0, ""))

    def test_the_check_passes_what_is_harmless(self):
        result = self.check(self.library())
        self.assertEqual((result.returncode, result.stderr), (0, ""))

    def test_the_check_sees_every_symbol_that_is_forbidden(self):
        result = self.check(self.library(*FORBIDDEN))
        self.assertEqual(result.returncode, 1)
        self.assertEqual(len(result.stderr.splitlines()), len(FORBIDDEN))
        for symbol in FORBIDDEN:
            self.assertIn(f"{symbol}.o: {symbol}: ", result.stderr)

    def test_the_check_fails_on_a_library_without_objects(self):
        path = os.path.join(self.folder, "libempty.a")
        subprocess.run(["ar", "cr", path], check=True)
        result = self.check(path)
        self.assertEqual(result.returncode, 1)
        self.assertIn("no objects", result.stderr)

    def test_the_check_fails_without_a_library(self):
        self.assertNotEqual(self.check(os.path.join(self.folder, "libnone.a")).returncode, 0)
        self.assertNotEqual(self.check().returncode, 0)
