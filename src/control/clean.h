// What the dead leave behind.
#pragma once

#include "control/state.h"

// Takes back what a device held whose processes are all dead (state_take_dead()): mounts, sockets, its
// run directory. 0, or a negative errno with err set.
int clean_dead(struct state *state, struct err *err);
