package main

import (
	"context"
	"errors"
	"io"

	"github.com/urfave/cli/v3"
	"go.uber.org/zap"
)

func serveCommand() *cli.Command {
	var c config
	return &cli.Command{
		Name:  "serve",
		Usage: "answer the endpoint until SIGINT or SIGTERM",
		Flags: c.flags(),
		Action: func(ctx context.Context, _ *cli.Command) error {
			if err := c.validate(); err != nil {
				return err
			}
			log, err := c.logger()
			if err != nil {
				return err
			}
			defer log.Sync() //nolint:errcheck // stderr
			return serve(ctx, &c, log)
		},
	}
}

// serve runs metad until ctx ends, a part of it fails, or another metad has taken over. What is
// started is ended in reverse.
func serve(ctx context.Context, c *config, log *zap.Logger) (err error) {
	ports := newPorts(log)
	own, err := takePossession(ctx, c, log, ports)
	if err != nil {
		return err
	}
	defer closing(own, &err)
	defer ports.close()

	d, err := newDaemon(c, log, own)
	if err != nil {
		return err
	}
	defer closing(d, &err)
	ports.connect(d.tasks.table, d.follower)

	parts := newParts(ctx, log)
	defer func() { err = errors.Join(err, parts.stop()) }()
	if err := d.listen(parts); err != nil {
		return err
	}
	defer closing(d.endpoint, &err)
	d.startPlugin(ctx, parts)
	if err := own.commit(ctx); err != nil {
		return err
	}
	d.run(parts)

	ctx, cancel := parts.until(ctx)
	defer cancel()
	for {
		succ := d.untilReplaced(ctx)
		if succ == nil {
			return d.stop(parts)
		}
		if done, err := d.leave(succ, parts); done || err != nil {
			return err
		}
	}
}

// closing joins the error of x's Close to *err.
func closing(x io.Closer, err *error) { *err = errors.Join(*err, x.Close()) }
