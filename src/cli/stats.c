// bight stats: how much an attached device does, and how fast.

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli/ask.h"
#include "cli/cli.h"
#include "control/client.h"
#include "control/metrics.h"
#include "core/stats.h"
#include "util/util.h"

static const char stats_help[] =
    "usage: bight stats [OPTIONS] NAME\n"
    "\n"
    "Shows an attached device's counters: requests, bytes, errors, latencies, requests in flight.\n"
    "\n"
    "  --watch              every second, what that second brought\n"
    "  --openmetrics        what Prometheus reads\n"
    "  --json               for programs\n"
    "  -h, --help\n"
    "\n"
    "See bight-stats(1).\n";

enum { FLAG_WATCH, FLAG_OPENMETRICS, FLAG_JSON, FLAG_NR };

static uint64_t number(struct json_object *object, const char *key)
{
    return json_object_get_uint64(json_object_object_get(object, key));
}

// before: NULL, or an earlier answer: then what has come since, a second.
static void stats_show(struct json_object *now, struct json_object *before)
{
    struct json_object *ops = json_object_object_get(now, "ops");
    double seconds = before ? (double)(number(now, "time_ns") - number(before, "time_ns")) / 1e9 : 1;
    struct json_object_iterator at = json_object_iter_begin(ops), end = json_object_iter_end(ops);

    printf("%" PRIu64 " in flight\n", number(now, "in_flight"));
    printf("%-13s %12s %10s %8s %10s %10s %10s\n", "op", before ? "IOPS" : "requests", before ? "MB/s" : "MB",
           "errors", "p50 us", "p99 us", "p99.9 us");
    for (; !json_object_iter_equal(&at, &end); json_object_iter_next(&at)) {
        const char *name = json_object_iter_peek_name(&at);
        struct json_object *op = json_object_iter_peek_value(&at), *old = NULL;
        struct json_object *latency = json_object_object_get(op, "latency_ns");
        uint64_t done = number(op, "done"), bytes = number(op, "bytes"), errors = number(op, "errors");
        uint64_t p50 = number(latency, "p50"), p99 = number(latency, "p99"), p999 = number(latency, "p99.9");
        struct op_stats since;

        if (!done)
            continue;
        if (before) {
            old = json_object_object_get(json_object_object_get(before, "ops"), name);
            done -= number(old, "done");
            bytes -= number(old, "bytes");
            errors -= number(old, "errors");
            metrics_latency_since(op, old, &since);
            p50 = stats_percentile_ns(&since, 50);
            p99 = stats_percentile_ns(&since, 99);
            p999 = stats_percentile_ns(&since, 99.9);
        }
        printf("%-13s %12.0f %10.1f %8" PRIu64 " %10.1f %10.1f %10.1f\n", name, (double)done / seconds,
               (double)bytes / seconds / 1e6, errors, (double)p50 / 1e3, (double)p99 / 1e3,
               (double)p999 / 1e3);
    }
    fflush(stdout);
}

static struct json_object *stats_request(bool is_openmetrics, bool has_buckets)
{
    struct json_object *request = client_request("stats");

    json_object_object_add(request, "openmetrics", json_object_new_boolean(is_openmetrics));
    json_object_object_add(request, "buckets", json_object_new_boolean(has_buckets));
    return request;
}

static int stats_watch(const char *who, struct json_object *before, struct err *err)
{
    for (;;) {
        struct json_object *now;

        sleep(1);
        now = ask(who, stats_request(false, true), err);
        if (!now)
            return ask_failed(err);
        stats_show(now, before);
        puts("");
        json_object_put(before);
        before = now;
    }
}

static int stats_main(int argc, char **argv)
{
    static const char *const names[] = {"--watch", "--openmetrics", "--json", NULL};
    bool flags[FLAG_NR] = {false};
    struct json_object *answer;
    struct err err = {.line = ""};
    int nr, ret = ask_parse(argc, argv, stats_help, names, flags, &nr);

    if (ret)
        return ret < 0 ? -ret : CLI_OK;
    if (nr != 1) {
        err_usage(&err, "stats: name one device; see bight list");
        return ask_failed(&err);
    }
    answer = ask(argv[1], stats_request(flags[FLAG_OPENMETRICS], flags[FLAG_WATCH]), &err);
    if (!answer)
        return ask_failed(&err);
    if (flags[FLAG_OPENMETRICS])
        fputs(client_string(answer, "openmetrics"), stdout);
    else if (flags[FLAG_JSON])
        ask_print(answer, true);
    else if (flags[FLAG_WATCH])
        return stats_watch(argv[1], answer, &err);
    else
        stats_show(answer, NULL);
    json_object_put(answer);
    return CLI_OK;
}

const struct cli_command cli_stats = {
    .name = "stats",
    .summary = "show an attached device's counters",
    .help = stats_help,
    .run = stats_main,
};
