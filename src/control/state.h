// The run directory: BASE/NAME/ is an attached device. BASE is $BIGHT_RUN_DIR, else /run/bight for root and
// $XDG_RUNTIME_DIR/bight for others.
//
//  Y1. Whoever serves the device (supervisor and worker) has a flock on the directory: without one, they
//      are dead, whatever is left.
//  Y2. Directories are made, and those of the dead removed, under the flock on BASE.
//  Y3. The first file in it is "command": a directory that has other files, but not this one, is somebody
//      else's, and is left alone.
//
// In it: "command", JSON: who attached it and how, for bight recover; "control", the socket; "state", JSON:
// what was asked for, for list and for cleaning up; "log"; "data" and "nbd", where no place was named for
// those.
#pragma once

#include <stdbool.h>

#include "util/log.h"

#define STATE_NAME_MAX 64
#define STATE_PATH_MAX 512

struct state {
    char name[STATE_NAME_MAX + 1];
    char path[STATE_PATH_MAX]; // of the directory
    int fd;                    // of it
};

// Whether this can be a device's name: 1 to 64 of A-Z a-z 0-9 . _ - and no . or - in front. Pure.
bool state_is_name(const char *name);

// A name for an image: "/a/disk.img" is "disk". Pure.
void state_name_of(const char *image_path, char name[STATE_NAME_MAX + 1]);

// Makes a directory and locks it (Y1): of that name, or, unless it has to be exactly that, of the first
// free one of NAME, NAME-2, NAME-3... 0, or a negative errno with err set (-EEXIST: taken).
int state_claim(struct state *state, const char *name, bool is_exact, struct err *err);

// An existing one. -ENOENT: there is none of that name.
int state_open(struct state *state, const char *name, struct err *err);
void state_close(struct state *state);

// Y1.
bool state_is_alive(const struct state *state);

// Whether all are dead, and the lock is ours now: nobody else cleans up.
bool state_take_dead(const struct state *state);

// Waits until the last of those who serve it has ended.
void state_wait_dead(const struct state *state);

// Removes the directory and all in it that is ours.
void state_remove(const struct state *state);

// Calls each(name, arg) for all devices' directories (Y3), in the order of names. 0 or a negative errno.
int state_each(void (*each)(const char *name, void *arg), void *arg, struct err *err);

// A file in the directory, as a whole. Read: to be freed, or NULL. Write: 0 or a negative errno.
char *state_read(const struct state *state, const char *file);
int state_write(const struct state *state, const char *file, const char *text);
