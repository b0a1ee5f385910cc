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

// run is main without the process: a test can call it. It returns the exit code: 0, 1 for an
// error (one line on stderr), or what the command's own documentation says.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	err := app(stdout, stderr).Run(ctx, args)
	if err == nil {
		return 0
	}
	code := 1
	var e exitError
	if errors.As(err, &e) {
		code, err = e.code, e.error
	}
	if err != nil {
		fmt.Fprintln(printable{stderr}, "metad:", err)
	}
	return code
}

// exitError is an error with an exit code of its own; a nil error prints nothing.
type exitError struct {
	error
	code int
}

func (e exitError) Error() string {
	if e.error == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.error.Error()
}

func app(stdout, stderr io.Writer) *cli.Command {
	root := &cli.Command{
		Name:      "metad",
		Usage:     "the ECS task metadata endpoint for every container on this host",
		Writer:    stdout,
		ErrWriter: stderr,
		// run prints, main exits
		ExitErrHandler: func(context.Context, *cli.Command, error) {},
		Action: func(_ context.Context, cmd *cli.Command) error {
			if cmd.Args().Present() {
				return fmt.Errorf("no command %q; metad --help lists them",
					cmd.Args().First())
			}
			return cli.ShowRootCommandHelp(cmd)
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
			detachCommand(),
			waitFileCommand(),
			nriGuardCommand(),
			{
				Name:  "version",
				Usage: "print the version",
				Action: func(context.Context, *cli.Command) error {
					fmt.Fprintln(stdout, "metad", version)
					return nil
				},
			},
		},
	}
	for _, cmd := range root.Commands {
		if cmd.ArgsUsage == "" {
			cmd.Before = func(ctx context.Context, cmd *cli.Command) (context.Context,
				error) {
				if cmd.Args().Present() {
					return ctx, fmt.Errorf("%s: unexpected argument %q",
						cmd.Name, cmd.Args().First())
				}
				return ctx, nil
			}
		}
	}
	for _, cmd := range append(root.Commands, root) {
		// One line, and not the help on top of it.
		cmd.OnUsageError = func(_ context.Context, _ *cli.Command, err error,
			_ bool) error {
			return err
		}
	}
	return root
}
