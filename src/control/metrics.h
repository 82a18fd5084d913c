// A device's counters, for people and for Prometheus.
#pragma once

#include <json-c/json.h>

struct device;

// By op: done, errors, bytes, latency percentiles in ns; in_flight. NULL: no memory.
struct json_object *metrics_json(const struct device *dev);

// OpenMetrics 1.0 text. To be freed; NULL: no memory.
char *metrics_text(const struct device *dev);
