#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "util/log.h"
#include "util/util.h"

static const struct cli_command *const commands[] = {
    &cli_attach, &cli_list,    &cli_show,  &cli_set,   &cli_switch, &cli_resize,
    &cli_detach, &cli_recover, &cli_stats, &cli_serve, &cli_map,    &cli_bench,
};

static int help(FILE *file)
{
    fprintf(file, "bight: serves a disk image as a block device\n\nusage: bight COMMAND [OPTIONS]\n\n");
    for (unsigned i = 0; i < ARRAY_SIZE(commands); i++)
        fprintf(file, "  %-10s %s\n", commands[i]->name, commands[i]->summary);
    fprintf(file, "  %-10s %s\n", "help", "this text, or that of a command: bight help COMMAND");
    fprintf(file, "\n  -h, --help\n  --version\n\n\"bight COMMAND --help\" and bight(1) tell more.\n");
    return CLI_OK;
}

static const struct cli_command *find(const char *name)
{
    for (unsigned i = 0; i < ARRAY_SIZE(commands); i++) {
        if (!strcmp(name, commands[i]->name))
            return commands[i];
    }
    log_line("%s: no such command; see bight --help", name);
    return NULL;
}

// A number below 3 that is closed would be that of the next file, which who prints then writes to.
static void open_std(void)
{
    int fd;

    do {
        fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    } while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0)
        close(fd);
}

// Whoever reads an output that is cut short would take it for all.
static int end(int status)
{
    if (!ferror(stdout) && !fflush(stdout))
        return status;
    log_line("standard output: %s; what was to be printed is lost", strerror(errno));
    return status ? status : CLI_ERROR;
}

int main(int argc, char **argv)
{
    const struct cli_command *command;

    open_std();
    if (argc < 2) {
        help(stderr);
        return CLI_USAGE;
    }
    if (!strcmp(argv[1], "--version")) {
        printf("bight %s\n", BIGHT_VERSION);
        return CLI_OK;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || (!strcmp(argv[1], "help") && argc == 2))
        return help(stdout);
    if (!strcmp(argv[1], "help")) {
        command = find(argv[2]);
        if (command)
            fputs(command->help, stdout);
        return command ? CLI_OK : CLI_USAGE;
    }
    command = find(argv[1]);
    return command ? end(command->run(argc - 1, argv + 1)) : CLI_USAGE;
}
