package main

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/urfave/cli/v3"
	"go.uber.org/zap"
)

func serveCommand() *cli.Command {
	var c config
	return &cli.Command{
		Name:  "serve",
		Usage: "answer the endpoint until SIGINT or SIGTERM",
		Flags: c.flags(),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			c.noteValues(cmd)
			if err := c.validate(); err != nil {
				return err
			}
			log, err := c.logger()
			if err != nil {
				return err
			}
			defer log.Sync() //nolint:errcheck // stderr
			again, err := serve(ctx, &c, log)
			if again == nil {
				return err
			}
			defer again.Close()
			if err != nil {
				log.Warn("end before a reload", zap.Error(err))
			}
			if ctx.Err() != nil { // SIGTERM
				return nil
			}
			return executeSelf(again)
		},
	}
}

// serve runs metad until ctx ends, a part of it fails, or another metad has taken over. What is
// started is ended in reverse. If a reload ends it, again is the file for executeSelf.
func serve(ctx context.Context, c *config, log *zap.Logger) (again *os.File, err error) {
	hups, stop := hangups()
	defer stop()
	ports := newPorts(log)
	own, err := takePossession(ctx, c, log, ports)
	if err != nil {
		return nil, err
	}
	defer closing(own, &err)
	defer ports.close()

	d, err := newDaemon(c, log, own)
	if err != nil {
		return nil, err
	}
	defer closing(d, &err)
	ports.connect(d.tasks.table, d.follower)

	parts := newParts(ctx, log)
	defer func() { err = errors.Join(err, parts.stop()) }()
	if err := d.listen(parts); err != nil {
		return nil, err
	}
	defer closing(d.endpoint, &err)
	d.startPlugin(ctx, parts)
	if err := own.commit(ctx); err != nil {
		return nil, err
	}
	d.run(parts)

	ctx, cancel := parts.until(ctx)
	defer cancel()
	for {
		succ, hup := d.untilReplaced(ctx, hups)
		switch {
		case succ != nil:
			if done, err := d.leave(succ, parts); done || err != nil {
				return nil, err
			}
		case hup && ctx.Err() == nil:
			if again, err := d.again(parts); again != nil || err != nil {
				return again, err
			}
		default:
			return nil, d.stop(parts)
		}
	}
}

// closing joins the error of x's Close to *err.
func closing(x io.Closer, err *error) { *err = errors.Join(*err, x.Close()) }
