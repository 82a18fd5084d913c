#!/usr/bin/python3
"""bight map: what it tells of files on real file systems."""
import json
import os
import unittest
import xml.etree.ElementTree

import harness
from harness import BIGHT, K, M, filesystem, have, run, scratch_dir, write_file


def extents_of(path):
    told = json.loads(run(BIGHT, "map", "--json", path).stdout)
    assert told["image"] == path
    return told


def scattered(path, block=64 * K):
    """Written, hole, unwritten, hole, written; a block each."""
    write_file(path, b"w" * block, size=5 * block)
    run("fallocate", "--keep-size", "--offset", 2 * block, "--length", block, path)
    with open(path, "r+b") as file:
        file.seek(4 * block)
        file.write(b"e" * block)
    return path


class Map(unittest.TestCase):
    def test_states_of_a_file(self):
        for kind in ("ext4", "xfs"):
            with self.subTest(kind), filesystem(kind) as point:
                path = scattered(f"{point}/disk.img")
                told = extents_of(path)
                self.assertEqual([(e["start_bytes"] // (64 * K), e["state"]) for e in told["extents"]],
                                 [(0, "written"), (1, "hole"), (2, "unwritten"), (3, "hole"), (4, "written")])
                self.assertEqual(told["nr_extents"], 3)
                self.assertEqual(told["size_bytes"], 320 * K)
                self.assertEqual(told["states"]["hole"]["bytes"], 128 * K)
                self.assertTrue(told["fastfs"]["possible"], told["fastfs"])
                self.assertEqual(told["fastfs"]["bytes"], 128 * K)
                with open(told["fastfs"]["device"], "rb") as device:
                    device.seek(told["extents"][4]["physical_bytes"])
                    self.assertEqual(device.read(64 * K), b"e" * 64 * K)
                text = run(BIGHT, "map", path).stdout
                self.assertIn("unwritten", text)
                self.assertRegex(text, "█+·+░+·+█+")
                self.assertRegex(text, "fastfs: could redirect 128 KiB in 2 extents")

    def test_shared_extents(self):
        with filesystem("xfs") as point:
            path = write_file(f"{point}/disk.img", b"s" * M)
            run("cp", "--reflink=always", path, f"{point}/copy.img")
            told = extents_of(path)
            self.assertEqual(told["states"]["shared"]["bytes"], M)
            self.assertEqual(told["fastfs"]["bytes"], 0)

    def test_picture(self):
        with scratch_dir() as folder:
            path, picture = write_file(f"{folder}/<&>.img", b"x" * M), f"{folder}/map.svg"
            run(BIGHT, "map", "--svg", picture, path)
            top = xml.etree.ElementTree.parse(picture).getroot()
            self.assertIn("<&>.img", top[0].text)
            self.assertGreater(len(top), 1000)

    def test_a_file_with_less_bytes_than_cells(self):
        with filesystem("xfs") as point, scratch_dir() as folder:
            path = write_file(f"{point}/disk.img", b"x" * 5)
            text = run(BIGHT, "map", "--svg", f"{folder}/map.svg", path).stdout
            self.assertRegex(text, "\n█{72}\n")
            self.assertEqual(harness.read_file(f"{folder}/map.svg").count(b"#e8e8e8"), 1)  # the legend's hole
            self.assertIn("for reading only: its size", text)

    def test_file_system_without_fiemap(self):
        with scratch_dir("/dev/shm") as folder:
            told = extents_of(write_file(f"{folder}/disk.img", b"x" * 64 * K, size=M))
            self.assertEqual([e["state"] for e in told["extents"]], ["other", "hole"])
            self.assertIn("tmpfs", told["fastfs"]["reason"])

    def test_empty_file(self):
        with scratch_dir() as folder:
            path = write_file(f"{folder}/disk.img")
            self.assertEqual(extents_of(path)["extents"], [])
            run(BIGHT, "map", "--svg", f"{folder}/map.svg", path)

    def test_mistakes_are_told_in_one_line(self):
        with scratch_dir() as folder:
            os.mkfifo(f"{folder}/fifo")
            for arguments, status, line in (
                ([f"{folder}/none"], 1, "No such file"), ([folder], 1, "no regular file"),
                ([f"{folder}/fifo"], 1, "no regular file"), ([], 2, "name one IMAGE"),
                ([folder, folder], 2, "name one IMAGE"), (["--svg"], 2, "needs a value"),
                (["--what", folder], 2, "no such option"),
                (["--svg", f"{folder}/no/such.svg", write_file(f"{folder}/disk.img")], 1, "writing the picture"),
            ):
                with self.subTest(arguments):
                    done = run(BIGHT, "map", *arguments, status=status)
                    self.assertRegex(done.stderr, rf"\Abight: .*{line}.*\n\Z")


@unittest.skipUnless(have("mkfs.ext4"), "not installed: mkfs.ext4")
class Fastfs(unittest.TestCase):
    """Why a file cannot be redirected."""

    def reason(self, path):
        told = extents_of(path)["fastfs"]
        self.assertFalse(told["possible"])
        return told["reason"]

    def test_journalled_data(self):
        with filesystem("ext4", options="data=journal") as point:
            self.assertIn("data=journal", self.reason(write_file(f"{point}/disk.img", b"x" * M)))
        with filesystem("ext4") as point:
            path = write_file(f"{point}/disk.img", b"x" * M)
            if run("chattr", "+j", path, status=None).returncode:
                self.skipTest("chattr +j is not permitted here")
            self.assertIn("chattr -j", self.reason(path))

    def test_journalled_data_as_the_default_of_the_file_system(self):
        with harness.loop_device(256 * M) as device:
            run("mkfs.ext4", "-q", "-F", device)
            run("tune2fs", "-o", "journal_data", device)
            with harness.mounted(device, "ext4") as point:
                self.assertIn("data=journal", self.reason(write_file(f"{point}/disk.img", b"x" * M)))

    def test_overlayfs(self):
        with filesystem("ext4") as point:
            for name in ("lower", "upper", "work"):
                os.mkdir(f"{point}/{name}")
            options = f"lowerdir={point}/lower,upperdir={point}/upper,workdir={point}/work"
            with harness.mounted("overlay", "overlay", options) as merged:
                self.assertIn("overlayfs", self.reason(write_file(f"{merged}/disk.img", b"x" * M)))


if __name__ == "__main__":
    unittest.main()
