package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/urfave/cli/v3"

	"metad/pkg/doctor"
	"metad/pkg/loader"
	"metad/pkg/mdfile"
)

func doctorCommand(stdout io.Writer) *cli.Command {
	var c config
	out := &output{w: stdout}
	return &cli.Command{
		Name: "doctor",
		Usage: "look for what could keep metad from working here; exit code 0: nothing, " +
			"1: warnings, 2: it will not work",
		Flags: append(out.flags(), c.flagsNamed("config", "bridges", "attach", "pin-dir",
			"docker-host", "nri-socket", "agent-url", "agent-introspection-url",
			"run-dir")...),
		Action: func(ctx context.Context, _ *cli.Command) error {
			if c.file.err != nil {
				return c.file.err
			}
			return out.report(doctor.Run(ctx, c.doctorConfig()))
		},
	}
}

func detachCommand() *cli.Command {
	var c config
	return &cli.Command{
		Name:  "detach",
		Usage: "remove what metad left on this host: filters, links, its namespace, pins",
		Flags: c.flagsNamed("config", "bridges", "pin-dir", "log-level", "log-format"),
		Action: func(ctx context.Context, _ *cli.Command) error {
			log, err := c.logger()
			if err != nil {
				return err
			}
			lock, err := loader.LockPinDir(ctx, c.pinDir, lockTime)
			if err != nil {
				return err
			}
			cfg := c.loaderConfig(log)
			if err := loader.Busy(cfg); err != nil {
				return errors.Join(err, lock.Close())
			}
			return errors.Join(loader.Detach(cfg), lock.Close())
		},
	}
}

func waitFileCommand() *cli.Command {
	var timeout time.Duration
	return &cli.Command{
		Name:      "wait-file",
		Usage:     "wait until the container metadata file says READY; for entrypoints",
		ArgsUsage: "[file]   default: $" + mdfile.EnvVar,
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "timeout", Value: 30 * time.Second,
				Usage:       "give up after this, with exit code 1",
				Destination: &timeout},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if cmd.Args().Len() > 1 {
				return fmt.Errorf("wait-file: unexpected argument %q",
					cmd.Args().Get(1))
			}
			path := cmd.Args().First()
			if path == "" {
				path = os.Getenv(mdfile.EnvVar)
			}
			if path == "" {
				return fmt.Errorf("wait-file: no file named, and %s is not set",
					mdfile.EnvVar)
			}
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			return mdfile.WaitFile(ctx, path)
		},
	}
}
