package kmstest

import "net/http"

// ControlPath is the prefix of the control interface.
const ControlPath = "/_devcloud/"

func (s *Server) serveControl(w http.ResponseWriter, r *http.Request) {
	http.NotFound(w, r)
}
