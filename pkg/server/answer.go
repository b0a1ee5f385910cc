package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"

	"github.com/valyala/fasthttp"
)

// What a request can end in other than success. Texts are for logs; answerTo has what clients see.
var (
	errBadRequest    = errors.New("malformed request")
	errExpectation   = errors.New("unknown expectation")
	errVersion       = errors.New("unknown HTTP version")
	errHeaderTooLong = errors.New("request header too long")
	errBodyTooLong   = errors.New("request body too long")
	errTooSlow       = errors.New("request too slow")

	errNoRoute       = errors.New("no such path")
	errLimited       = errors.New("rate limit reached")
	errBusy          = errors.New("too many at a time")
	errUnknownSource = errors.New("unknown source")
	errNoTask        = errors.New("task is gone")
	errNoContainer   = errors.New("no such container in the task")
	errNoStats       = errors.New("container has no statistics")
	errNoTaskStats   = errors.New("task has no containers")
	errPanic         = errors.New("panic")

	errAgentFailed = errors.New("agent failed")
	errAgentSlow   = errors.New("agent too slow")
)

const (
	typeJSON = "application/json"
	typeText = "text/plain; charset=utf-8"
)

// asked is what an answer to a failed request may have to name.
type asked struct {
	addr string // source address
	arn  string // task
	id   []byte // container, as decoded from the path
}

// answerTo maps an error to the status, content type and body that the client gets. Texts and
// statuses are the ECS agent's wherever it has any (agent/handlers/v2, net/http).
func answerTo(err error, a asked) (status int, contentType string, body []byte) {
	switch err {
	case errUnknownSource:
		return jsonText(http.StatusBadRequest,
			"Unable to get task arn from request: unable to associate '"+a.addr+"' with task")
	case errNoTask:
		return jsonText(http.StatusBadRequest, "Unable to generate metadata for task: '"+a.arn+"'")
	case errNoContainer:
		return jsonText(http.StatusBadRequest, "Unable to generate metadata for container '"+string(a.id)+"'")
	case errNoStats:
		return jsonText(http.StatusBadRequest, "Unable to get container stats for: "+string(a.id))
	case errNoTaskStats:
		return jsonText(http.StatusBadRequest, "Unable to get task stats for: "+a.arn)
	case errNoRoute:
		return http.StatusNotFound, typeText, []byte("404 page not found\n")
	case errLimited:
		return http.StatusTooManyRequests, typeText, []byte("You have reached maximum request limit.")
	case errPanic:
		return http.StatusInternalServerError, typeJSON, []byte("{}")
	case errBusy:
		return jsonError(http.StatusServiceUnavailable, "Busy", "too many requests of this task or host are being answered")
	case errAgentFailed:
		return jsonError(http.StatusBadGateway, "AgentFailed", "the ECS agent closed the connection or sent no valid answer")
	case errAgentSlow:
		return jsonError(http.StatusGatewayTimeout, "AgentTimeout", "the ECS agent did not answer in time")
	case errHeaderTooLong:
		return plainText(http.StatusRequestHeaderFieldsTooLarge)
	case errBodyTooLong:
		return plainText(http.StatusRequestEntityTooLarge)
	case errTooSlow:
		return plainText(http.StatusRequestTimeout)
	case errExpectation:
		return plainText(http.StatusExpectationFailed)
	case errVersion:
		return plainText(http.StatusHTTPVersionNotSupported)
	default:
		return plainText(http.StatusBadRequest)
	}
}

// jsonText is the agent's way of telling an error: a bare JSON string.
func jsonText(status int, text string) (int, string, []byte) {
	b, _ := json.Marshal(text) // a string always has a JSON form
	return status, typeJSON, b
}

// jsonError is {"code": name, "message": text, "HTTPErrorCode": status}, the shape of the errors of the
// agent's credentials paths, of which AWS SDKs show code and message.
func jsonError(status int, code, message string) (int, string, []byte) {
	return status, typeJSON, fmt.Appendf(nil, `{"code":%q,"message":%q,"HTTPErrorCode":%d}`, code, message, status)
}

// plainText is net/http's way of telling an error.
func plainText(status int) (int, string, []byte) {
	return status, typeText, fmt.Appendf(nil, "%d %s", status, http.StatusText(status))
}

// closes reports whether the connection cannot be used after err.
func closes(err error) bool {
	switch err {
	case errUnknownSource, errNoTask, errNoContainer, errNoStats, errNoTaskStats, errNoRoute, errLimited,
		errBusy, errAgentFailed, errAgentSlow:
		return false
	}
	return true
}

// fail makes err the response.
func fail(resp *fasthttp.Response, err error, a asked) {
	status, contentType, body := answerTo(err, a)
	resp.SetStatusCode(status)
	resp.Header.SetContentType(contentType)
	resp.SetBodyRaw(body)
	if err == errNoRoute {
		resp.Header.Set("X-Content-Type-Options", "nosniff")
	}
	if err == errBusy {
		resp.Header.Set("Retry-After", "1")
	}
	if closes(err) {
		resp.SetConnectionClose()
	}
}

// rawAnswer is err's answer as it goes over a connection that fasthttp does not write to.
func rawAnswer(err error) []byte {
	status, contentType, body := answerTo(err, asked{})
	retry := ""
	if err == errBusy {
		retry = "Retry-After: 1\r\n"
	}
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n%sConnection: close\r\n\r\n%s",
		status, http.StatusText(status), contentType, len(body), retry, body)
}

// readError tells what kept fasthttp from reading a request.
func readError(err error) error {
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
