package main

import (
	"context"
	"errors"
	"io"

	"github.com/urfave/cli/v3"
)

var errNotYet = errors.New("not built yet")

func notYet(context.Context, *cli.Command) error { return errNotYet }

func serveCommand() *cli.Command {
	var c config
	return &cli.Command{
		Name:  "serve",
		Usage: "answer the endpoint until SIGINT or SIGTERM",
		Flags: c.flags(),
		Action: func(context.Context, *cli.Command) error {
			if err := c.validate(); err != nil {
				return err
			}
			return errNotYet
		},
	}
}
func doctorCommand(io.Writer) *cli.Command { return &cli.Command{Name: "doctor", Action: notYet} }
func detachCommand(io.Writer) *cli.Command { return &cli.Command{Name: "detach", Action: notYet} }
func waitFileCommand() *cli.Command        { return &cli.Command{Name: "wait-file", Action: notYet} }
