// A device's counters, for people and for Prometheus.
#pragma once

#include <json-c/json.h>
#include <stdbool.h>

struct device;
struct op_stats;

// By op: done, errors, bytes, latency percentiles in ns, and the buckets they come from if that is asked for;
// in_flight. NULL: no memory.
struct json_object *metrics_json(const struct device *dev, bool has_buckets);

// Into op's latencies: those of an op between two answers with buckets.
void metrics_latency_since(struct json_object *now, struct json_object *before, struct op_stats *op);

// OpenMetrics 1.0 text. To be freed; NULL: no memory.
char *metrics_text(const struct device *dev);
