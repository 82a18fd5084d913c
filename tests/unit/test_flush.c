#include "unit.h"

#include "core/flush.h"

static const struct row {
    struct durability_in in; // read-only, stored, sync, write-back
    struct durability out;
} rows[] = {
    {{false, false, false, false}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{false, false, false, true}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{false, false, true, false}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{false, false, true, true}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{false, true, false, false}, {true, FLUSH_FDATASYNC, FUA_DSYNC}},
    {{false, true, false, true}, {true, FLUSH_FDATASYNC, FUA_DSYNC}},
    {{false, true, true, false}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{false, true, true, true}, {true, FLUSH_FDATASYNC, FUA_DSYNC}},
    {{true, false, false, false}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{true, false, false, true}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{true, false, true, false}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{true, false, true, true}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{true, true, false, false}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{true, true, false, true}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{true, true, true, false}, {false, FLUSH_NOTHING, FUA_NOTHING}},
    {{true, true, true, true}, {false, FLUSH_NOTHING, FUA_NOTHING}},
};

static void check(bool is_read_only, bool is_stored, bool is_sync, bool has_writeback)
{
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        const struct row *row = &rows[i];
        struct durability out;

        if (row->in.is_read_only != is_read_only || row->in.is_stored != is_stored ||
            row->in.is_sync != is_sync || row->in.has_writeback != has_writeback)
            continue;
        out = flush_durability(&row->in);
        assert_int_equal(out.has_volatile_cache, row->out.has_volatile_cache);
        assert_int_equal(out.flush, row->out.flush);
        assert_int_equal(out.fua, row->out.fua);
        return;
    }
    fail_msg("no row for %d %d %d %d", is_read_only, is_stored, is_sync, has_writeback);
}

static void what_is_redirected_is_flushed_where_it_went(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 16; i++) {
        struct durability_in in = {i & 1, i & 2, i & 4, i & 8, .has_device_fd = true};
        struct durability out = flush_durability(&in);
        bool is_durable = in.is_read_only || !in.is_stored; // O_SYNC is the file's, not the device's

        assert_int_equal(out.has_volatile_cache, !is_durable);
        assert_int_equal(out.flush, is_durable ? FLUSH_NOTHING : FLUSH_BOTH);
        assert_int_equal(out.fua, is_durable ? FUA_NOTHING : FUA_DSYNC);
    }
}

static void a_writable_stored_image_has_a_volatile_cache(void **state)
{
    (void)state;
    check(false, true, false, false);
}

static void a_read_only_device_promises_nothing(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 8; i++)
        check(true, i & 1, i & 2, i & 4);
}

static void what_is_not_stored_needs_no_flush(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 8; i++)
        check(i & 1, false, i & 2, i & 4);
}

static void a_synchronous_file_is_durable_at_once(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 4; i++)
        check(i & 1, i & 2, true, false);
}

static void write_back_is_a_volatile_cache_on_any_file(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 2; i++)
        check(false, true, i & 1, true);
}

// What is advertised and what is done never part.
static void a_cache_is_advertised_exactly_if_flush_does_something(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 16; i++) {
        struct durability_in in = {.is_read_only = i & 1,
                                   .is_stored = i & 2,
                                   .is_sync = i & 4,
                                   .has_writeback = i & 8};
        struct durability out = flush_durability(&in);

        assert_int_equal(out.has_volatile_cache, out.flush == FLUSH_FDATASYNC);
        assert_int_equal(out.has_volatile_cache, out.fua == FUA_DSYNC);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_redirected_is_flushed_where_it_went),
        cmocka_unit_test(a_writable_stored_image_has_a_volatile_cache),
        cmocka_unit_test(a_read_only_device_promises_nothing),
        cmocka_unit_test(what_is_not_stored_needs_no_flush),
        cmocka_unit_test(a_synchronous_file_is_durable_at_once),
        cmocka_unit_test(write_back_is_a_volatile_cache_on_any_file),
        cmocka_unit_test(a_cache_is_advertised_exactly_if_flush_does_something),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
