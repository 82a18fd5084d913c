// The subcommands: one file each, one table in main.c.
#pragma once

struct cli_command {
    const char *name;
    const char *summary;               // a line of "bight --help"
    const char *help;                  // "bight NAME --help"
    int (*run)(int argc, char **argv); // argv[0] is the subcommand; returns the exit status
};

extern const struct cli_command cli_serve;
extern const struct cli_command cli_bench;
extern const struct cli_command cli_map;
extern const struct cli_command cli_attach, cli_list, cli_show, cli_set, cli_switch, cli_resize, cli_detach,
    cli_recover, cli_stats;

// Exit statuses.
enum {
    CLI_OK = 0,
    CLI_ERROR = 1,
    CLI_USAGE = 2,
};
