package engine;

import java.io.IOException;
import java.net.URI;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import software.amazon.awssdk.core.async.AsyncRequestBody;
import software.amazon.awssdk.core.async.AsyncResponseTransformer;
import software.amazon.awssdk.core.retry.RetryMode;
import software.amazon.awssdk.regions.Region;
import software.amazon.awssdk.services.s3.S3AsyncClient;

/**
 * Backups in a bucket, with the operations of Zeebe's S3BackupStore: the asynchronous client on Netty with adaptive
 * retries, a manifest that is made and changed by compare-and-swap around single PutObjects.
 */
final class BackupStore implements AutoCloseable {
  private static final String IN_PROGRESS = "IN_PROGRESS";
  private static final String COMPLETED = "COMPLETED";

  private final S3AsyncClient s3;
  private final String bucket;

  BackupStore(String endpoint, String bucket) {
    this.bucket = bucket;
    s3 = S3AsyncClient.builder().endpointOverride(URI.create(endpoint)).region(Region.EU_CENTRAL_1).forcePathStyle(true)
        .overrideConfiguration(c -> c.retryStrategy(RetryMode.ADAPTIVE_V2)).build();
  }

  /** Stores a directory's files; fails when a backup of this name is there or a request was refused for good. */
  void save(String name, Path directory) throws IOException {
    var files = new ArrayList<Path>();
    try (var all = Files.walk(directory)) {
      all.filter(Files::isRegularFile).sorted().forEach(files::add);
    }
    var tag = s3.putObject(b -> b.bucket(bucket).key(manifest(name)).ifNoneMatch("*"), AsyncRequestBody.fromString(IN_PROGRESS)).join().eTag();
    var uploads = new ArrayList<CompletableFuture<?>>();
    var lines = new StringBuilder(COMPLETED);
    for (var file : files) {
      var relative = directory.relativize(file).toString();
      lines.append('\n').append(Directories.checksum(Files.readAllBytes(file))).append(' ').append(relative);
      uploads.add(s3.putObject(b -> b.bucket(bucket).key(prefix(name) + "files/" + relative), AsyncRequestBody.fromFile(file)));
    }
    CompletableFuture.allOf(uploads.toArray(CompletableFuture[]::new)).join();
    s3.putObject(b -> b.bucket(bucket).key(manifest(name)).ifMatch(tag), AsyncRequestBody.fromString(lines.toString())).join();
  }

  /** Fetches a completed backup into a directory and checks every file. */
  void restore(String name, Path directory) throws IOException {
    var lines = get(manifest(name)).asUtf8String().split("\n");
    if (!lines[0].equals(COMPLETED)) {
      throw new IOException("backup " + name + " is " + lines[0]);
    }
    for (var line : List.of(lines).subList(1, lines.length)) {
      var pair = line.split(" ", 2);
      var content = get(prefix(name) + "files/" + pair[1]).asByteArray();
      if (Directories.checksum(content) != Long.parseLong(pair[0])) {
        throw new IOException("file " + pair[1] + " of backup " + name + " is not as it was stored");
      }
      var path = directory.resolve(pair[1]);
      Files.createDirectories(path.getParent());
      Files.write(path, content);
    }
  }

  private software.amazon.awssdk.core.ResponseBytes<?> get(String key) {
    return s3.getObject(b -> b.bucket(bucket).key(key), AsyncResponseTransformer.toBytes()).join();
  }

  private static String prefix(String name) {
    return "engine/" + name + "/";
  }

  private static String manifest(String name) {
    return prefix(name) + "manifest";
  }

  @Override
  public void close() {
    s3.close();
  }
}
