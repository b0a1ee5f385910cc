package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"time"

	"github.com/urfave/cli/v3"
)

// This file asks a running metad, by its admin socket.

func runDirFlag(dst *string) cli.Flag {
	return &cli.StringFlag{Name: "run-dir", Value: defaultRunDir,
		Usage:       "run directory of the running metad",
		Destination: dst, Sources: cli.EnvVars("METAD_RUN_DIR")}
}

const (
	// answerTime bounds the wait for a running metad: for a whole answer, or for the beginning
	// of one that goes on.
	answerTime = 5 * time.Second
	maxAnswer  = 1 << 28 // of an answer, in bytes
)

// fetch asks the running metad for JSON, and waits answerTime for it.
func fetch[T any](ctx context.Context, runDir, path string) (v T, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	body, err := askSocket(ctx, runDir, path)
	if err != nil {
		return v, err
	}
	defer body.Close()
	err = json.NewDecoder(io.LimitReader(body, maxAnswer)).Decode(&v)
	return v, unread(ctx, adminSocket(runDir), path, err)
}

// unread is err of reading an answer, nil if err is.
func unread(ctx context.Context, socket, path string, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return unanswered(socket, ctx.Err())
	}
	return fmt.Errorf("%s: %s: %w", socket, path, err)
}

// askSocket asks the running metad. Its errors say what to do. The caller closes the body, and
// bounds by ctx how long it may take to come.
func askSocket(ctx context.Context, runDir, path string) (io.ReadCloser, error) {
	socket := adminSocket(runDir)
	transport := &http.Transport{DisableKeepAlives: true, ResponseHeaderTimeout: answerTime,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: answerTime}).DialContext(ctx, "unix", socket)
		}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://metad"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, unanswered(socket, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	const enough = 300 // bytes of a reason
	why, _ := bufio.NewReader(io.LimitReader(resp.Body, enough)).ReadString('\n')
	if resp.StatusCode == http.StatusNotFound {
		why = "the running metad has no such path: is it of another version? " +
			"metad version is this one's, metad_build_info of /metrics its own"
	}
	return nil, fmt.Errorf("%s: %s: %s: %s", socket, path, resp.Status, oneLine(why))
}

// unanswered says what to do about a socket that gives no answer.
func unanswered(socket string, err error) error {
	var late net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w (want root, or a member of metad's --admin-group)", err)
	case errors.As(err, &late) && late.Timeout():
		return fmt.Errorf("%s: no answer within %s: see metad's log, and "+
			"systemctl status metad", socket, answerTime)
	default:
		return fmt.Errorf("is metad running? %w (systemctl start metad starts it, "+
			"--run-dir says where it is)", err)
	}
}
