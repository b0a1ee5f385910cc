// Command metad answers the ECS task metadata endpoint for every container on this host.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/urfave/cli/v3"
)

// version is set by the linker; see the Makefile.
var version = "unknown"

// The process's first thread must never enter another network namespace: it cannot end afterwards
// as other threads do, and /proc/self would show the wrong namespace. Locked to main, it runs no
// other goroutine.
func init() { runtime.LockOSThread() }

func main() {
	// Nearly all allocations are samples, each discarded after a second. Collecting them
	// earlier than usual costs little, and saves a quarter of the memory on a host of 1,000
	// containers.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args, os.Stdout, os.Stderr))
}

// run is main without the process: a test can call it. It returns one of exitCodes.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	err := app(stdout, stderr).Run(ctx, args)
	if err == nil {
		return codeOK
	}
	code := codeError
	var e exitError
	if errors.As(err, &e) {
		code, err = e.code, e.error
	}
	if err != nil {
		fmt.Fprintln(printable{stderr}, "metad:", err)
	}
	return code
}

func app(stdout, stderr io.Writer) *cli.Command {
	root := &cli.Command{
		Name:        "metad",
		Usage:       "the ECS task metadata endpoint for every container on this host",
		Description: exitCodeHelp(),
		Writer:      stdout,
		ErrWriter:   stderr,
		// run prints, main exits
		ExitErrHandler: func(context.Context, *cli.Command, error) {},
		Flags: []cli.Flag{&cli.BoolFlag{Name: "version", Aliases: []string{"v"},
			Usage: "print the version", Local: true}},
		Action: func(_ context.Context, cmd *cli.Command) error {
			switch {
			case cmd.Args().Present():
				return fmt.Errorf("no command %q; metad --help lists them",
					cmd.Args().First())
			case cmd.Bool("version"):
				return printVersion(&output{w: stdout})
			}
			return cli.ShowRootCommandHelp(cmd)
		},
		EnableShellCompletion: true,
		ConfigureShellCompletionCommand: func(c *cli.Command) {
			c.Hidden = false
			c.Usage = "print what makes a shell complete metad's commands and flags"
		},
		Commands: []*cli.Command{
			serveCommand(),
			tasksCommand(stdout),
			topCommand(stdout),
			doctorCommand(stdout),
			explainCommand(stdout),
			verdictsCommand(stdout),
			eventsCommand(stdout),
			mapCommand(stdout),
			configCommand(stdout),
			bugreportCommand(stdout),
			detachCommand(),
			waitFileCommand(),
			nriGuardCommand(),
			versionCommand(stdout),
		},
	}
	for _, cmd := range root.Commands {
		if cmd.ArgsUsage == "" {
			cmd.ArgValidator = noArguments
		}
	}
	for _, cmd := range append(root.Commands, root) {
		cmd.OnUsageError = usageError
	}
	return root
}

func noArguments(_ context.Context, cmd *cli.Command) error {
	if cmd.Args().Present() {
		return fmt.Errorf("%s: unexpected argument %q", cmd.Name, cmd.Args().First())
	}
	return nil
}

// usageError is one line in place of the help.
func usageError(_ context.Context, cmd *cli.Command, err error, _ bool) error {
	return fmt.Errorf("%w; %s --help lists the flags", err, cmd.FullName())
}
