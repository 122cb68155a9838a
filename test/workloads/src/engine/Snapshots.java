package engine;

import java.io.IOException;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.StandardOpenOption;
import java.util.TreeMap;
import org.rocksdb.RocksDBException;

/** Checkpoints of the state by journal position: written aside, checksummed, renamed into place, synced. */
final class Snapshots {
  private static final String CHECKSUMS = "CHECKSUMS";

  private final Path directory;
  private final Path pending;

  Snapshots(Path data) throws IOException {
    directory = Files.createDirectories(data.resolve("snapshots"));
    pending = data.resolve("pending");
  }

  /** The newest one, null for none. */
  Path latest() throws IOException {
    try (var all = Files.list(directory)) {
      return all.max((a, b) -> Long.compare(position(a), position(b))).orElse(null);
    }
  }

  static long position(Path snapshot) {
    return Long.parseLong(snapshot.getFileName().toString());
  }

  /** Takes one of the state at a position, and removes the older ones. */
  Path take(State state, long position) throws IOException, RocksDBException {
    var place = directory.resolve(Long.toString(position));
    if (Files.exists(place)) {
      return place;
    }
    Directories.delete(pending);
    state.checkpoint(pending);
    Files.writeString(pending.resolve(CHECKSUMS), checksums(pending));
    for (var path : Directories.files(pending)) {
      try (var channel = FileChannel.open(path, StandardOpenOption.READ)) {
        channel.force(true);
      }
    }
    Directories.sync(pending);
    Files.move(pending, place, StandardCopyOption.ATOMIC_MOVE);
    Directories.sync(directory);
    try (var all = Files.list(directory)) {
      for (var old : all.filter(path -> position(path) < position).toList()) {
        Directories.delete(old);
      }
    }
    return place;
  }

  private static String checksums(Path snapshot) throws IOException {
    var all = new TreeMap<String, Long>();
    for (var path : Directories.files(snapshot)) {
      if (!path.endsWith(CHECKSUMS)) {
        all.put(path.getFileName().toString(), Directories.checksum(Files.readAllBytes(path)));
      }
    }
    return all.toString();
  }

  /** Makes the directory that the state runs in from a snapshot: tables by hard links, what RocksDB changes by copies. */
  static void open(Path snapshot, Path runtime) throws IOException {
    var want = Files.readString(snapshot.resolve(CHECKSUMS));
    var got = checksums(snapshot);
    if (!want.equals(got)) {
      throw new IOException("snapshot " + snapshot + " is not as it was written: " + got + " instead of " + want);
    }
    Files.createDirectories(runtime);
    for (var path : Directories.files(snapshot)) {
      var name = path.getFileName().toString();
      if (name.endsWith(".sst")) {
        Files.createLink(runtime.resolve(name), path);
      } else if (!name.equals(CHECKSUMS)) {
        Files.copy(path, runtime.resolve(name));
      }
    }
  }
}
