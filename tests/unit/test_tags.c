#include "unit.h"

#include <string.h>

#include "core/tags.h"

struct big_rq {
    struct rq rq;
    char more[100];
};

static void every_tag_is_given_out_once_then_none(void **state)
{
    struct tags tags;
    bool seen[7] = {false};

    (void)state;
    assert_int_equal(tags_create(&tags, 7, sizeof(struct big_rq)), 0);
    for (unsigned i = 0; i < 7; i++) {
        struct rq *rq = tags_get(&tags);

        assert_non_null(rq);
        assert_true(rq->tag < 7);
        assert_false(seen[rq->tag]);
        seen[rq->tag] = true;
        assert_int_equal(tags_nr_used(&tags), i + 1);
        assert_false(tags.is_exhausted);
    }
    assert_null(tags_get(&tags));
    assert_null(tags_get(&tags));
    assert_true(tags.is_exhausted);
    assert_int_equal(tags_nr_used(&tags), 7);
    tags_destroy(&tags);
}

static void tags_do_not_overlap_and_begin_zeroed(void **state)
{
    struct tags tags;
    struct big_rq *rqs[5];

    (void)state;
    assert_int_equal(tags_create(&tags, 5, sizeof(struct big_rq)), 0);
    for (unsigned i = 0; i < 5; i++) {
        rqs[i] = (struct big_rq *)(void *)tags_get(&tags);
        for (unsigned j = 0; j < sizeof(rqs[i]->more); j++)
            assert_int_equal(rqs[i]->more[j], 0);
        memset(rqs[i]->more, (int)i + 1, sizeof(rqs[i]->more));
    }
    for (unsigned i = 0; i < 5; i++) {
        assert_int_equal(rqs[i]->rq.tag, i);
        for (unsigned j = 0; j < sizeof(rqs[i]->more); j++)
            assert_int_equal(rqs[i]->more[j], i + 1);
    }
    tags_destroy(&tags);
}

static void the_tag_used_last_is_given_out_first(void **state)
{
    struct tags tags;
    struct rq *a, *b;

    (void)state;
    assert_int_equal(tags_create(&tags, 8, sizeof(struct rq)), 0);
    a = tags_get(&tags);
    b = tags_get(&tags);
    assert_int_equal(a->tag, 0);
    assert_int_equal(b->tag, 1);
    tags_put(&tags, b);
    tags_put(&tags, a);
    assert_ptr_equal(tags_get(&tags), a);
    assert_ptr_equal(tags_get(&tags), b);
    tags_destroy(&tags);
}

static void check_resume(unsigned depth)
{
    struct tags tags;
    struct rq *rqs[64] = {NULL};
    unsigned nr_free = 0;

    assert_int_equal(tags_create(&tags, depth, sizeof(struct rq)), 0);
    for (unsigned i = 0; i < depth; i++)
        rqs[i] = tags_get(&tags);
    assert_true(tags_can_resume(&tags)); // all in use, but nobody was refused
    assert_null(tags_get(&tags));
    assert_false(tags_can_resume(&tags));
    while (!tags_can_resume(&tags)) {
        assert_true(nr_free * 2 < depth);
        tags_put(&tags, rqs[nr_free++]);
    }
    assert_true(nr_free * 2 >= depth);
    assert_true((nr_free - 1) * 2 < depth);
    // Once resumed it goes on down to the last one.
    while (nr_free--)
        assert_non_null(tags_get(&tags));
    assert_true(tags_can_resume(&tags));
    assert_null(tags_get(&tags));
    assert_false(tags_can_resume(&tags));
    tags_destroy(&tags);
}

static void a_stopped_producer_resumes_at_half(void **state)
{
    (void)state;
    for (unsigned depth = 1; depth <= 64; depth++)
        check_resume(depth);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_tag_is_given_out_once_then_none),
        cmocka_unit_test(tags_do_not_overlap_and_begin_zeroed),
        cmocka_unit_test(the_tag_used_last_is_given_out_first),
        cmocka_unit_test(a_stopped_producer_resumes_at_half),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
