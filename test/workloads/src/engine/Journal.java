package engine;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.MappedByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.ArrayList;
import java.util.List;
import java.util.zip.CRC32C;

/**
 * An append-only log in segments that are mapped whole, shared and writable: made exclusively, filled with zeros, flushed
 * by msync, renamed before they are unlinked, and unlinked while still mapped. For one thread.
 */
final class Journal {
  /** Length, CRC-32C and position before each record; a length of zero ends a segment. */
  private static final int HEAD = 16;

  private static final String SUFFIX = ".log";
  private static final String DELETED = "-deleted";

  private final Path directory;
  private final int segmentSize;
  private final List<Segment> segments = new ArrayList<>();
  private long last; // position of the last record

  /** A record of the log. */
  record Entry(long position, byte[] content) {}

  private record Segment(Path path, long first, MappedByteBuffer buffer) {}

  Journal(Path directory, int segmentSize) throws IOException {
    this.directory = Files.createDirectories(directory);
    this.segmentSize = segmentSize;
    for (var path : Directories.files(directory)) {
      if (path.toString().endsWith(DELETED)) {
        Files.delete(path); // it died between the rename and this
      }
    }
  }

  /** Opens what is there and returns the records after a position. A record that was cut by a crash ends the log. */
  List<Entry> replay(long after) throws IOException {
    var entries = new ArrayList<Entry>();
    last = after;
    for (var path : Directories.files(directory)) {
      var name = path.getFileName().toString();
      long first = Long.parseLong(name.substring(0, name.length() - SUFFIX.length()));
      var segment = new Segment(path, first, map(path));
      segments.add(segment);
      for (Entry entry; (entry = next(segment.buffer)) != null; ) {
        if (entry.position > after) {
          if (entry.position != last + 1) {
            throw new IOException("the journal goes from " + last + " to " + entry.position + " in " + path);
          }
          entries.add(entry);
          last = entry.position;
        }
      }
    }
    if (segments.isEmpty()) {
      roll();
    }
    return entries;
  }

  private static Entry next(MappedByteBuffer buffer) {
    int start = buffer.position();
    if (buffer.remaining() < HEAD) {
      return null;
    }
    int length = buffer.getInt(start);
    if (length <= 0 || length > buffer.remaining() - HEAD) {
      return null;
    }
    long position = buffer.getLong(start + 8);
    var content = new byte[length];
    buffer.get(start + HEAD, content);
    if (buffer.getInt(start + 4) != checksum(position, content)) {
      return null;
    }
    buffer.position(start + HEAD + length);
    return new Entry(position, content);
  }

  private static int checksum(long position, byte[] content) {
    var crc = new CRC32C();
    crc.update(ByteBuffer.allocate(8).putLong(0, position));
    crc.update(content);
    return (int) crc.getValue();
  }

  private static MappedByteBuffer map(Path path) throws IOException {
    try (var channel = FileChannel.open(path, StandardOpenOption.READ, StandardOpenOption.WRITE)) {
      return channel.map(FileChannel.MapMode.READ_WRITE, 0, channel.size());
    }
  }

  /** Appends a record, not yet durable, and returns its position. */
  long append(byte[] content) throws IOException {
    if (current().buffer.remaining() < HEAD + content.length) {
      flush();
      roll();
    }
    var buffer = current().buffer;
    long position = last + 1;
    int start = buffer.position();
    buffer.putLong(start + 8, position);
    buffer.put(start + HEAD, content);
    buffer.putInt(start + 4, checksum(position, content));
    buffer.putInt(start, content.length);
    buffer.position(start + HEAD + content.length);
    last = position;
    return position;
  }

  /** Makes everything appended so far durable: msync(MS_SYNC). */
  void flush() {
    current().buffer.force();
  }

  private Segment current() {
    return segments.get(segments.size() - 1);
  }

  /** Begins a new segment. */
  void roll() throws IOException {
    var path = directory.resolve(String.format("%019d%s", last + 1, SUFFIX));
    if (!segments.isEmpty() && current().path.equals(path)) {
      return; // nothing was appended to it
    }
    try (var channel = FileChannel.open(path, StandardOpenOption.CREATE_NEW, StandardOpenOption.READ, StandardOpenOption.WRITE)) {
      var zeros = ByteBuffer.allocateDirect(1 << 20);
      for (long at = 0; at < segmentSize; at += zeros.capacity()) {
        zeros.clear().limit((int) Math.min(zeros.capacity(), segmentSize - at));
        while (zeros.hasRemaining()) {
          channel.write(zeros, at + zeros.position());
        }
      }
      channel.force(true);
      Directories.sync(directory);
      segments.add(new Segment(path, last + 1, channel.map(FileChannel.MapMode.READ_WRITE, 0, segmentSize)));
    }
  }

  /** The files that hold records up to a position only. */
  List<Path> files(long upTo) {
    var all = new ArrayList<Path>();
    for (int i = 0; i + 1 < segments.size() && segments.get(i + 1).first <= upTo + 1; i++) {
      all.add(segments.get(i).path);
    }
    return all;
  }

  /** Deletes the segments that hold records up to a position only; they stay mapped until they are collected. */
  void compact(long upTo) throws IOException {
    for (var path : files(upTo)) {
      var deleted = path.resolveSibling(path.getFileName() + DELETED);
      Files.move(path, deleted);
      Directories.sync(directory);
      Files.delete(deleted);
      var segment = segments.remove(0);
      if (segment.buffer.get(0) != 0) {
        throw new IOException("a record is longer than 16 MiB in " + path); // read after the unlink: the mapping must hold
      }
    }
  }
}
