// A change of a device while it is in use: another image, another size, another io... Clients see a pause.
#pragma once

#include "core/device.h"
#include "image/image.h"
#include "writeback/writeback.h"

#define DEVICE_CHANGE_MAX_SETS 16

struct setting;

struct device_change {
    struct err err; // what is wrong, when it failed
    // Optional. Main thread, frozen still: it has come true, and what comes next will rely on it.
    void (*committed)(struct device_change *change);
    void *arg; // for the caller
    // The rest is change.c's.
    struct device *dev;
    struct ring *ring;
    void (*done)(struct device_change *change, int error);
    struct freeze freeze;
    struct ring_op op; // from thread to thread
    int error;
    char *path; // of another image, or NULL
    struct {
        const struct setting *setting;
        char *value;
    } sets[DEVICE_CHANGE_MAX_SETS];
    unsigned nr_sets;
    struct device_options options; // as they will be
    int old_flags;                 // of the image's fd
    bool is_changed;               // next is what the image becomes
    struct image next;
    // What takes the place of the device's, and then what was there before. NULL: that one stays.
    struct image *image;
    struct map *map;
    struct io *io;
    struct writeback *writeback; // takes the place of the device's in any case
    struct writeback_drain drain;
};

// ring: the main thread's, where done() will be called with 0 or a negative errno.
void device_change_init(struct device_change *change, struct device *dev, struct ring *ring,
                        void (*done)(struct device_change *change, int error));

// What it is to be: any of them, before device_change_start(). 0 or a negative errno with err set.
int device_change_set(struct device_change *change, const char *key, const char *value);
int device_change_image(struct device_change *change, const char *path);

// All or nothing of it; with nothing set, the image is measured again. Main thread.
void device_change_start(struct device_change *change);

// Before done(), instead of device_change_start(). It is over after done() as well.
void device_change_end(struct device_change *change);

// The keys, in the order of a table for people: the i-th, or NULL. *values: what it takes.
const char *device_change_key(unsigned i, const char **values);
