package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/valyala/fasthttp"

	"metad/pkg/agentproxy"
)

const (
	typeJSON = "application/json"
	typeText = "text/plain; charset=utf-8"
)

// failure is the answer to a request that fails. A handler returns one of the variables below, or
// nil. Texts and statuses are the ECS agent's wherever it has any
// (agent/handlers, ecs-agent/tmds/handlers, net/http).
type failure struct {
	status      int
	contentType string
	// body is the answer's. In a text with names, {addr} stands for the source address, {arn}
	// for the task and {id} for the container: its Docker id, or its name in the path.
	body   string
	names  bool // body has such a word, and the answer is the text as a JSON string
	closes bool // the connection cannot be used afterwards
	header [2]string
}

// Requests that could not be read. These close the connection.
var (
	errBadRequest     = plainText(http.StatusBadRequest)
	errBadExpectation = plainText(http.StatusExpectationFailed) // other than 100-continue
	errBadVersion     = plainText(http.StatusHTTPVersionNotSupported)
	errHeaderTooLong  = plainText(http.StatusRequestHeaderFieldsTooLarge)
	errBodyTooLong    = plainText(http.StatusRequestEntityTooLarge)
	errTooSlow        = plainText(http.StatusRequestTimeout)
	errPanicked       = &failure{status: http.StatusInternalServerError, contentType: typeJSON,
		body: "{}", closes: true}
)

// Requests that could be read.
var (
	errNoRoute = &failure{status: http.StatusNotFound, contentType: typeText,
		body:   "404 page not found\n",
		header: [2]string{"X-Content-Type-Options", "nosniff"}}
	errLimited = &failure{status: http.StatusTooManyRequests, contentType: typeText,
		body: "You have reached maximum request limit."}

	errUnknownSource = jsonText(http.StatusBadRequest,
		"Unable to get task arn from request: unable to associate '{addr}' with task")
	errNoTask = jsonText(http.StatusBadRequest,
		"Unable to generate metadata for task: '{arn}'")
	errNoContainer = jsonText(http.StatusBadRequest,
		"Unable to generate metadata for container '{id}'")
	errNoStats = jsonText(http.StatusBadRequest,
		"Unable to get container stats for: {id}")
	errNoTaskStats = jsonText(http.StatusBadRequest, "Unable to get task stats for: {arn}")
	errNoStatsV4   = jsonText(http.StatusInternalServerError,
		"Unable to get container stats for: {id}")
	errNoTaskStatsV4 = jsonText(http.StatusInternalServerError,
		"Unable to get task stats for: {arn}")
	errWhichV2 = jsonText(http.StatusNotFound, "Unable to get container ID from request: "+
		whichContainer)

	errBusy = jsonError(http.StatusServiceUnavailable, "Busy",
		"too many requests of this task or host are being answered",
		"Retry-After", "1")
	errAgentFailed = jsonError(http.StatusBadGateway, "AgentFailed",
		"the ECS agent closed the connection or sent no valid answer")
	errAgentSlow = jsonError(http.StatusGatewayTimeout, "AgentTimeout",
		"the ECS agent did not answer in time")
)

// plainText is an error in net/http's form.
func plainText(status int) *failure {
	return &failure{status: status, contentType: typeText, closes: true,
		body: fmt.Sprintf("%d %s", status, http.StatusText(status))}
}

// jsonText is an error in the agent's form: a bare JSON string.
func jsonText(status int, text string) *failure {
	return &failure{status: status, contentType: typeJSON, body: text, names: true}
}

// jsonError is {"code": name, "message": text, "HTTPErrorCode": status}, the shape of the errors of
// the agent's credentials paths, of which AWS SDKs show code and message.
func jsonError(status int, code, message string, header ...string) *failure {
	f := &failure{status: status, contentType: typeJSON,
		body: fmt.Sprintf(`{"code":%q,"message":%q,"HTTPErrorCode":%d}`, code, message,
			status)}
	copy(f.header[:], header)
	return f
}

// answerTo returns the answer to a request for an error while it was read or passed on.
func answerTo(err error) *failure {
	var body *agentproxy.BodyError
	switch {
	case errors.Is(err, agentproxy.ErrAmbiguous):
		return errBadRequest
	case errors.Is(err, agentproxy.ErrBodyTooLong):
		return errBodyTooLong
	case errors.Is(err, agentproxy.ErrSlow):
		return errAgentSlow
	case errors.Is(err, agentproxy.ErrFailed):
		return errAgentFailed
	case errors.As(err, &body):
		return readError(body.Err)
	}
	return readError(err)
}

// readError returns the answer to a request that fasthttp could not read.
func readError(err error) *failure {
	var small *fasthttp.ErrSmallBuffer
	var netErr net.Error
	switch {
	case errors.As(err, &small):
		return errHeaderTooLong
	case errors.As(err, &netErr) && netErr.Timeout():
		return errTooSlow
	}
	return errBadRequest
}

// text returns the body of the answer to c's request. c is nil if there is no request.
func (f *failure) text(c *conn) []byte {
	if !f.names {
		return []byte(f.body)
	}
	arn, id := c.arn, string(c.target.name)
	if c.view != nil {
		arn = c.view.Task.ARN
	}
	if c.container != nil {
		id = c.container.ID
	}
	named := strings.NewReplacer("{addr}", c.remote.Addr().String(), "{arn}", arn, "{id}",
		id).Replace(f.body)
	b, _ := json.Marshal(named) // a string always has a JSON form
	return b
}

// fail makes f the response to c's request.
func fail(resp *fasthttp.Response, f *failure, c *conn) {
	resp.SetStatusCode(f.status)
	resp.Header.SetContentType(f.contentType)
	resp.SetBodyRaw(f.text(c))
	if f.header[0] != "" {
		resp.Header.Set(f.header[0], f.header[1])
	}
	if f.closes {
		resp.SetConnectionClose()
	}
}

// raw returns f's answer with its head, for a connection that fasthttp does not write to. f has a
// text without names.
func (f *failure) raw() []byte {
	more := ""
	if f.header[0] != "" {
		more = f.header[0] + ": " + f.header[1] + "\r\n"
	}
	return fmt.Appendf(nil,
		"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n%sConnection: "+
			"close\r\n\r\n%s",
		f.status, http.StatusText(f.status), f.contentType, len(f.body), more, f.body)
}
