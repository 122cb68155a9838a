// Package connlimit bounds the connections of a listener, so that whoever opens
// thousands of them takes neither memory nor descriptors from the others.
//
// A connection that comes when the limit is reached takes the place of the one that
// has been silent for longest among those that carry no request which was found
// authentic (Busy). Where all carry one, the place of one is taken that has been silent
// for a minute; where there is none either, the new connection is closed at once.
package connlimit
