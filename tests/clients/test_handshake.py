#!/usr/bin/python3
"""The handshake: greeting, every option, and what each may answer."""
import os
import struct
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import raw
from harness import K, M

FIRST, SECOND = 3 * M + 517, 64 * K


class Handshake(unittest.TestCase):
    """One server with two images for all tests."""

    @classmethod
    def setUpClass(cls):
        cls.dir = cls.enterClassContext(harness.scratch_dir())
        images = [harness.write_file(os.path.join(cls.dir, name), harness.pattern(size, seed))
                  for seed, (name, size) in enumerate((("first.img", FIRST), ("second.img", SECOND)))]
        cls.server = cls.enterClassContext(harness.Server(*images))

    def client(self, flags=raw.FLAG_C_FIXED_NEWSTYLE | raw.FLAG_C_NO_ZEROES):
        client = self.enterContext(self.server.client())
        client.greet(flags)
        return client

    def refused(self, client, option, data=b"", kinds=(raw.REP_ERR_INVALID,)):
        kind = client.option(option, data)[-1][0]
        self.assertIn(kind, kinds, f"option {option} with {len(data)} bytes of data")

    def assert_haggling(self, client):
        """The connection is still good for options and for the transmission phase."""
        self.assertEqual(client.list().keys(), {"first.img", "second.img"})
        client.go("second.img")
        self.assertEqual(client.read(0, 100), harness.pattern(100, 1))

    def assert_closed(self, client):
        with self.assertRaises(raw.Closed):
            while True:
                client.fill()
        self.assertFalse(client.buffer, "bytes before the server closed")

    # greeting

    def test_greeting_offers_fixed_newstyle_and_no_zeroes(self):
        client = self.enterContext(self.server.client())
        self.assertEqual(client.greet(), 3)

    def test_unknown_client_flags_close_the_connection(self):
        for flags in (4, 0x80000000, 0xFFFFFFFF, 7):
            with self.subTest(flags=hex(flags)):
                self.assert_closed(self.client(flags))

    def test_client_flags_one_byte_at_a_time(self):
        client = self.enterContext(self.server.client())
        client.recv(18)
        for byte in struct.pack(">I", 3):
            client.send(bytes([byte]))
        client.no_zeroes = True
        self.assert_haggling(client)

    # EXPORT_NAME

    def test_export_name_selects_by_name(self):
        for name, size in (("first.img", FIRST), ("second.img", SECOND)):
            client = self.client()
            client.export_name(name)
            self.assertEqual(client.size, size)
            self.assertEqual(client.read(1, 10), harness.pattern(11, int(name == "second.img"))[1:])

    def test_empty_export_name_is_the_first_image(self):
        client = self.client()
        client.export_name("")
        self.assertEqual(client.size, FIRST)

    def test_unknown_export_name_closes_the_connection(self):
        for name in ("nothing", "first.im", "first.img ", "FIRST.IMG", "x" * 4096):
            with self.subTest(name=name[:20]):
                client = self.client()
                client.send(raw.option_bytes(raw.OPT_EXPORT_NAME, name.encode()))
                self.assert_closed(client)

    def test_export_name_pads_with_zeroes_unless_told_not_to(self):
        for flags in (0, raw.FLAG_C_FIXED_NEWSTYLE, raw.FLAG_C_NO_ZEROES):
            with self.subTest(flags=flags):
                client = self.client(flags)
                client.export_name("second.img")  # checks the padding
                self.assertEqual(client.read(0, 512), harness.pattern(512, 1))

    def test_export_name_after_structured_reply_uses_it(self):
        client = self.client()
        client.set_mode("structured")
        client.meta(raw.OPT_SET_META_CONTEXT, "second.img")
        client.export_name("second.img")
        self.assertTrue(client.flags & raw.SEND_DF)
        self.assertEqual(client.read(0, 512), harness.pattern(512, 1))
        self.assertTrue(client.block_status(0, SECOND))

    def test_export_name_after_extended_headers_closes_the_connection(self):
        client = self.client()
        client.set_mode("extended")
        client.send(raw.option_bytes(raw.OPT_EXPORT_NAME, b"first.img"))
        self.assert_closed(client)

    # ABORT

    def test_abort_is_acknowledged_and_the_connection_closed(self):
        for data in (b"", b"data that is to be ignored"):
            client = self.client()
            self.assertEqual(client.option(raw.OPT_ABORT, data), [(raw.REP_ACK, b"")])
            self.assert_closed(client)

    def test_abort_without_waiting_for_the_reply(self):
        client = self.client()
        client.send(raw.option_bytes(raw.OPT_ABORT))
        client.close()
        self.assert_haggling(self.client())

    # LIST

    def test_list_names_every_export_once(self):
        self.assertEqual(self.client().list().keys(), {"first.img", "second.img"})

    def test_list_twice(self):
        client = self.client()
        self.assertEqual(client.list(), client.list())

    def test_list_with_data_is_invalid(self):
        client = self.client()
        self.refused(client, raw.OPT_LIST, b"x")
        self.assert_haggling(client)

    # INFO and GO

    def test_info_then_go_tell_the_same(self):
        for mode in raw.MODES:
            client = self.client()
            client.set_mode(mode)
            infos = (raw.INFO_EXPORT, raw.INFO_NAME, raw.INFO_DESCRIPTION, raw.INFO_BLOCK_SIZE)
            info = client.query(raw.OPT_INFO, "second.img", infos)
            client.go("second.img", infos)
            self.assertEqual(info, client.info)

    def test_info_does_not_enter_transmission(self):
        client = self.client()
        client.query(raw.OPT_INFO, "first.img")
        self.assert_haggling(client)

    def test_info_without_requests_tells_the_size(self):
        client = self.client()
        self.assertEqual(client.query(raw.OPT_INFO, "first.img")[raw.INFO_EXPORT][0], FIRST)
        self.assertEqual(client.query(raw.OPT_INFO, "second.img")[raw.INFO_EXPORT][0], SECOND)

    def test_block_size_info(self):
        info = self.client().query(raw.OPT_INFO, "first.img", (raw.INFO_BLOCK_SIZE,))
        self.assertEqual(info[raw.INFO_BLOCK_SIZE], (1, 4096, raw.MAX_PAYLOAD))

    def test_name_info_of_the_default_export_is_its_real_name(self):
        info = self.client().query(raw.OPT_INFO, "", (raw.INFO_NAME,))
        self.assertEqual(info[raw.INFO_NAME], "first.img")

    def test_description_agrees_with_list(self):
        client = self.client()
        info = client.query(raw.OPT_INFO, "second.img", (raw.INFO_DESCRIPTION,))
        self.assertEqual(info.get(raw.INFO_DESCRIPTION, ""), client.list()["second.img"])

    def test_unknown_information_requests_are_ignored(self):
        info = self.client().query(raw.OPT_INFO, "first.img", (4, 77, 0xFFFF, raw.INFO_BLOCK_SIZE))
        self.assertIn(raw.INFO_BLOCK_SIZE, info)

    def test_unknown_export_is_told_and_haggling_goes_on(self):
        for option in (raw.OPT_INFO, raw.OPT_GO):
            client = self.client()
            for name in ("nothing", "first", "first.img\n", "é"):
                replies = client.option(option, raw.info_data(name))
                self.assertEqual([kind for kind, _ in replies], [raw.REP_ERR_UNKNOWN], name)
            self.assert_haggling(client)

    def test_info_and_go_with_wrong_lengths_are_invalid(self):
        name = b"first.img"
        good = raw.info_data("first.img", (raw.INFO_BLOCK_SIZE,))
        wrong = [good[:cut] for cut in range(len(good))] + [
            good + b"x",
            struct.pack(">I", 0xFFFFFFFF) + name + bytes(4),
            struct.pack(">I", 0x7FFFFFFF) + name + bytes(2),
            struct.pack(">I", len(name) + 1) + name + bytes(2),
            struct.pack(">I", len(name)) + name + struct.pack(">H", 0xFFFF),
            struct.pack(">I", len(name)) + name + struct.pack(">HH", 2, 3),
            struct.pack(">I", len(name)) + name + struct.pack(">HHH", 1, 3, 3),
        ]
        client = self.client()
        for data in wrong:
            for option in (raw.OPT_INFO, raw.OPT_GO):
                with self.subTest(option=option, data=data.hex()):
                    self.refused(client, option, data)
        self.assert_haggling(client)

    def test_go_with_a_name_longer_than_a_string_may_be(self):
        for length in (4096, 4097, 60000):
            client = self.client()
            self.refused(client, raw.OPT_GO, raw.info_data("n" * length),
                         (raw.REP_ERR_UNKNOWN, raw.REP_ERR_INVALID, raw.REP_ERR_TOO_BIG))
            self.assert_haggling(client)

    def test_go_by_the_default_name_and_by_name(self):
        for name, size in (("", FIRST), ("first.img", FIRST), ("second.img", SECOND)):
            client = self.client()
            client.go(name)
            self.assertEqual(client.size, size)

    # transmission flags

    def test_flags_of_a_writable_export(self):
        client = self.client()
        client.go()
        self.assertEqual(client.flags, raw.HAS_FLAGS | raw.SEND_FLUSH | raw.SEND_FUA | raw.SEND_TRIM | raw.SEND_CACHE |
                         raw.SEND_WRITE_ZEROES | raw.SEND_FAST_ZERO | raw.CAN_MULTI_CONN)

    def test_df_is_offered_with_structured_replies_and_extended_headers_only(self):
        for mode in raw.MODES:
            client = self.client()
            client.set_mode(mode)
            client.go()
            self.assertEqual(bool(client.flags & raw.SEND_DF), mode != "simple")

    def test_payloads_of_block_status_and_resize_are_not_offered(self):
        client = self.client()
        client.set_mode("extended")
        client.meta(raw.OPT_SET_META_CONTEXT)
        client.go()
        self.assertFalse(client.flags & (raw.BLOCK_STATUS_PAYLOAD | raw.SEND_RESIZE))

    # STRUCTURED_REPLY and EXTENDED_HEADERS

    def test_structured_reply_with_data_is_invalid_and_changes_nothing(self):
        client = self.client()
        self.refused(client, raw.OPT_STRUCTURED_REPLY, b"x")
        self.assert_haggling(client)  # reads in simple mode

    def test_structured_reply_twice_stays_structured(self):
        client = self.client()
        client.set_mode("structured")
        self.refused(client, raw.OPT_STRUCTURED_REPLY, b"", (raw.REP_ACK, raw.REP_ERR_INVALID))
        self.assert_haggling(client)

    def test_extended_headers_with_data_is_invalid_and_changes_nothing(self):
        client = self.client()
        self.refused(client, raw.OPT_EXTENDED_HEADERS, b"x")
        self.assert_haggling(client)

    def test_extended_headers_twice_stays_extended(self):
        client = self.client()
        client.set_mode("extended")
        self.refused(client, raw.OPT_EXTENDED_HEADERS, b"", (raw.REP_ACK, raw.REP_ERR_INVALID))
        self.assert_haggling(client)

    def test_extended_headers_after_structured_reply_take_precedence(self):
        client = self.client()
        client.set_mode("structured")
        client.set_mode("extended")
        self.assert_haggling(client)

    def test_structured_reply_after_extended_headers_is_refused(self):
        client = self.client()
        client.set_mode("extended")
        self.refused(client, raw.OPT_STRUCTURED_REPLY, b"", (raw.REP_ERR_EXT_HEADER_REQD,))
        self.assert_haggling(client)

    # metadata contexts

    def test_set_meta_context_needs_structured_replies(self):
        client = self.client()
        self.refused(client, raw.OPT_SET_META_CONTEXT, raw.meta_data("", ["base:allocation"]))
        self.assert_haggling(client)

    def test_list_meta_context_answers_wildcards(self):
        for mode in ("structured", "extended"):
            client = self.client()
            client.set_mode(mode)
            for queries in ([], ["base:"], ["base:allocation"], ["x-other:", "base:allocation"],
                            ["base:allocation"] * 3):
                self.assertEqual(client.meta(raw.OPT_LIST_META_CONTEXT, "", queries).keys(), {"base:allocation"})

    def test_unknown_meta_contexts_are_ignored(self):
        for option in (raw.OPT_LIST_META_CONTEXT, raw.OPT_SET_META_CONTEXT):
            client = self.client()
            client.set_mode("structured")
            for query in ("x-bight:", "qemu:dirty-bitmap:a", "base:allocatio", "base:allocation2", "base:ALLOCATION"):
                self.assertEqual(client.meta(option, "", [query]), {}, query)

    def test_set_meta_context_selects_nothing_by_wildcard_or_without_queries(self):
        client = self.client()
        client.set_mode("structured")
        for queries in ([], ["base:"]):
            self.assertEqual(client.meta(raw.OPT_SET_META_CONTEXT, "", queries), {})

    def test_set_meta_context_selects_once(self):
        client = self.client()
        client.set_mode("structured")
        chosen = client.meta(raw.OPT_SET_META_CONTEXT, "", ["x-a:b", "base:allocation", "base:allocation"])
        self.assertEqual(chosen.keys(), {"base:allocation"})

    def test_meta_context_of_an_unknown_export(self):
        for option in (raw.OPT_LIST_META_CONTEXT, raw.OPT_SET_META_CONTEXT):
            client = self.client()
            client.set_mode("structured")
            self.refused(client, option, raw.meta_data("nothing", ["base:allocation"]), (raw.REP_ERR_UNKNOWN,))
            self.assert_haggling(client)

    def test_meta_context_with_wrong_lengths_is_invalid(self):
        good = raw.meta_data("first.img", ["base:allocation", "x-a:b"])
        name = struct.pack(">I", 9) + b"first.img"
        wrong = [good[:cut] for cut in range(len(good))] + [
            good + b"x",
            struct.pack(">I", 0xFFFFFFFF) + good[4:],
            name + struct.pack(">I", 0xFFFFFFFF),
            name + struct.pack(">I", 3) + good[len(name) + 4:],
            name + struct.pack(">II", 1, 0xFFFFFFFF) + b"base:allocation",
            name + struct.pack(">II", 1, 16) + b"base:allocation",
        ]
        client = self.client()
        client.set_mode("structured")
        for data in wrong:
            for option in (raw.OPT_LIST_META_CONTEXT, raw.OPT_SET_META_CONTEXT):
                with self.subTest(option=option, data=data.hex()):
                    self.refused(client, option, data)
        self.assert_haggling(client)

    def block_status_error(self, client):
        return client.command(raw.BLOCK_STATUS, 0, 4096).error

    def test_meta_context_of_another_export_does_not_count(self):
        for mode in ("structured", "extended"):
            client = self.client()
            client.set_mode(mode)
            client.meta(raw.OPT_SET_META_CONTEXT, "second.img")
            client.go("first.img")
            self.assertEqual(self.block_status_error(client), raw.EINVAL)

    def test_a_failed_set_meta_context_forgets_the_one_before(self):
        client = self.client()
        client.set_mode("structured")
        client.meta(raw.OPT_SET_META_CONTEXT, "first.img")
        self.refused(client, raw.OPT_SET_META_CONTEXT, b"\0\0\0\xff")
        client.go("first.img")
        self.assertEqual(self.block_status_error(client), raw.EINVAL)

    def test_the_last_set_meta_context_counts(self):
        client = self.client()
        client.set_mode("structured")
        client.meta(raw.OPT_SET_META_CONTEXT, "first.img")
        client.meta(raw.OPT_SET_META_CONTEXT, "first.img", [])
        client.go("first.img")
        self.assertEqual(self.block_status_error(client), raw.EINVAL)

    def test_extended_headers_after_set_meta_context_keep_it(self):
        client = self.client()
        client.set_mode("structured")
        client.meta(raw.OPT_SET_META_CONTEXT, "first.img")
        client.set_mode("extended")
        client.go("first.img")
        self.assertEqual(client.command(raw.BLOCK_STATUS, 0, 4096).error, 0)

    # others

    def test_starttls_is_refused(self):
        client = self.client()
        self.refused(client, raw.OPT_STARTTLS, b"", (raw.REP_ERR_UNSUP, raw.REP_ERR_POLICY))
        self.assert_haggling(client)

    def test_unknown_options_are_told_and_their_data_skipped(self):
        client = self.client()
        for option in (0, raw.OPT_PEEK_EXPORT, 12, 255, 0x80000007, 0xFFFFFFFF):
            for data in (b"", b"x", raw.option_bytes(raw.OPT_ABORT), bytes(4000)):
                self.refused(client, option, data, (raw.REP_ERR_UNSUP,))
        self.assert_haggling(client)

    def test_options_one_byte_at_a_time(self):
        client = self.client()
        message = raw.option_bytes(raw.OPT_GO, raw.info_data("second.img", (raw.INFO_BLOCK_SIZE,)))
        for byte in raw.option_bytes(raw.OPT_LIST) + message:
            client.send(bytes([byte]))
        self.assertEqual(len(client.option_replies(raw.OPT_LIST)), 3)
        self.assertEqual(client.option_replies(raw.OPT_GO)[-1], (raw.REP_ACK, b""))

    def test_wrong_option_magic_closes_the_connection(self):
        for magic in (0, raw.NBDMAGIC, raw.IHAVEOPT ^ 1):
            client = self.client()
            client.send(raw.option_bytes(raw.OPT_LIST, magic=magic))
            self.assert_closed(client)

    def test_a_request_in_one_packet_with_go_is_served(self):
        client = self.client()
        client.send(raw.option_bytes(raw.OPT_GO, raw.info_data("second.img")) + client.request(raw.READ, 5, 7)[1])
        self.assertEqual(client.option_replies(raw.OPT_GO)[-1], (raw.REP_ACK, b""))
        self.assertEqual(client.wait(1).data, harness.pattern(12, 1)[5:])


class ReadOnly(harness.Case):
    def test_a_read_only_export_says_so(self):
        server = self.serve(self.image(size=M), args=["--read-only"])
        for mode in raw.MODES:
            client = self.enterContext(server.connect(mode))
            self.assertTrue(client.flags & raw.READ_ONLY)
            self.assertTrue(client.flags & raw.CAN_MULTI_CONN)


class BlockSize(harness.Case):
    def test_block_size_is_told_as_the_minimum(self):
        for size in (512, 1024, 4096):
            with self.subTest(size=size), harness.Server(self.image(size=M), args=["--block-size", size]) as server:
                with server.connect() as client:
                    self.assertEqual(client.info[raw.INFO_BLOCK_SIZE], (size, 4096, raw.MAX_PAYLOAD))
                with server.client() as client:  # told also to whoever did not ask
                    client.greet()
                    client.go("", ())
                    self.assertIn(raw.INFO_BLOCK_SIZE, client.info)

    def test_block_status_is_of_whole_blocks_at_any_offset(self):
        image = self.image(size=M)
        with open(image, "r+b") as file:
            file.seek(40 * K)
            file.write(b"x" * 4 * K)
        for offset, size in ((100, 512), (512, 4096), (1000, 4096)):
            with harness.Server(image, args=["--offset", offset, "--block-size", size]) as server:
                for mode in raw.MODES[1:]:
                    with self.subTest(offset=offset, size=size, mode=mode), server.connect(mode) as client:
                        extents = client.allocation()  # checks the lengths
                        data = [(at, at + length) for at, length, flags in extents if not flags]
                        self.assertTrue(any(begin <= 40 * K - offset and end >= 44 * K - offset for begin, end in data))


if __name__ == "__main__":
    unittest.main()
