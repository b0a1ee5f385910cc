package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"

	"github.com/valyala/fasthttp"
)

// failure is what a request ends in if not in what was asked for. answerTo has what clients see of it.
type failure uint8

const (
	served failure = iota // none

	badRequest
	badExpectation // Expect, other than 100-continue
	badVersion     // of HTTP
	headerTooLong
	bodyTooLong
	tooSlow

	noRoute
	limited // by the rate
	busy    // too many at a time
	unknownSource
	noTask // there was one a request ago
	noContainer
	noStats
	noTaskStats
	panicked

	agentFailed
	agentSlow
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

// answerTo maps a failure to the status, content type and body that the client gets. Texts and
// statuses are the ECS agent's wherever it has any (agent/handlers/v2, net/http).
func answerTo(f failure, a asked) (status int, contentType string, body []byte) {
	switch f {
	case unknownSource:
		return jsonText(http.StatusBadRequest,
			"Unable to get task arn from request: unable to associate '"+a.addr+"' with task")
	case noTask:
		return jsonText(http.StatusBadRequest, "Unable to generate metadata for task: '"+a.arn+"'")
	case noContainer:
		return jsonText(http.StatusBadRequest, "Unable to generate metadata for container '"+string(a.id)+"'")
	case noStats:
		return jsonText(http.StatusBadRequest, "Unable to get container stats for: "+string(a.id))
	case noTaskStats:
		return jsonText(http.StatusBadRequest, "Unable to get task stats for: "+a.arn)
	case noRoute:
		return http.StatusNotFound, typeText, []byte("404 page not found\n")
	case limited:
		return http.StatusTooManyRequests, typeText, []byte("You have reached maximum request limit.")
	case panicked:
		return http.StatusInternalServerError, typeJSON, []byte("{}")
	case busy:
		return jsonError(http.StatusServiceUnavailable, "Busy", "too many requests of this task or host are being answered")
	case agentFailed:
		return jsonError(http.StatusBadGateway, "AgentFailed", "the ECS agent closed the connection or sent no valid answer")
	case agentSlow:
		return jsonError(http.StatusGatewayTimeout, "AgentTimeout", "the ECS agent did not answer in time")
	case headerTooLong:
		return plainText(http.StatusRequestHeaderFieldsTooLarge)
	case bodyTooLong:
		return plainText(http.StatusRequestEntityTooLarge)
	case tooSlow:
		return plainText(http.StatusRequestTimeout)
	case badExpectation:
		return plainText(http.StatusExpectationFailed)
	case badVersion:
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

// closes reports whether the connection cannot be used after it.
func (f failure) closes() bool {
	switch f {
	case unknownSource, noTask, noContainer, noStats, noTaskStats, noRoute, limited,
		busy, agentFailed, agentSlow:
		return false
	}
	return true
}

// fail makes f the response.
func fail(resp *fasthttp.Response, f failure, a asked) {
	status, contentType, body := answerTo(f, a)
	resp.SetStatusCode(status)
	resp.Header.SetContentType(contentType)
	resp.SetBodyRaw(body)
	if f == noRoute {
		resp.Header.Set("X-Content-Type-Options", "nosniff")
	}
	if f == busy {
		resp.Header.Set("Retry-After", "1")
	}
	if f.closes() {
		resp.SetConnectionClose()
	}
}

// rawAnswer is f's answer as it goes over a connection that fasthttp does not write to.
func rawAnswer(f failure) []byte {
	status, contentType, body := answerTo(f, asked{})
	retry := ""
	if f == busy {
		retry = "Retry-After: 1\r\n"
	}
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n%sConnection: close\r\n\r\n%s",
		status, http.StatusText(status), contentType, len(body), retry, body)
}

// readError tells what kept fasthttp from reading a request.
func readError(err error) failure {
	var small *fasthttp.ErrSmallBuffer
	var netErr net.Error
	switch {
	case errors.As(err, &small):
		return headerTooLong
	case errors.As(err, &netErr) && netErr.Timeout():
		return tooSlow
	}
	return badRequest
}
